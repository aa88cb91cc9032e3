"""From a source to a corpus: the same bytes however it is made, all that is bad in the report, nothing half done."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blm_jax.data import command
from blm_jax.data.corpora import prepare as prepare_module
from blm_jax.data.corpora import sources
from blm_jax.data.corpora.corpus import open_corpus
from blm_jax.data.corpora.prepare import ShardMaker
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import PixelConfig
from blm_jax.errors import RequestError, RunError
from tests.data.corpora.material import asked, open_engine, png, write_lines, write_source
from tests.data.corpora.test_sources import write_examples

RECORDS = 40
SHARDS = 6
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty records, and after them two bad ones and an empty line."""
    path = write_source(tmp_path_factory.mktemp("source"), RECORDS)
    with path.open("ab") as file:
        file.write(b'{"id": 1}\n\n' + json.dumps(asked("<image>?", image="none.png")).encode())
    return path


@pytest.fixture(scope="module")
def made_engine(model_files: Path) -> PromptEngine:
    return open_engine(str(model_files))


@pytest.fixture(scope="module")
def prepare(made_engine: PromptEngine) -> Iterator[Callable[..., dict[str, Any]]]:
    def call(source: Any, out: Path, **settings: Any) -> dict[str, Any]:
        settings = {"workers": 0, "records_per_shard": 7, "max_bad": 0.1} | settings
        return command.prepare(str(source), settings.pop("open_engine", lambda: made_engine), str(out), **settings)

    with pytest.MonkeyPatch.context() as patch:
        # Which looks through the vocabulary each time; engines of these tests differ by their pixels alone.
        @functools.cache
        def known(pixels: PixelConfig) -> dict[str, Any]:
            return real(PromptEngine(made_engine.config, made_engine.tokenizer, pixels))

        real = prepare_module.reading
        patch.setattr(prepare_module, "reading", lambda engine: known(engine.pixels))
        yield call


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def expected(source: Path, prepare: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "corpus"
    result = prepare(source, out)
    assert {name: result[name] for name in ("read", "records", "bad")} == {"read": RECORDS + 2, "records": RECORDS, "bad": 2}
    return contents(out)


def test_what_is_in_it(expected: dict[str, bytes]) -> None:
    shards = [f"data-{number:05}.array_record" for number in range(SHARDS)]
    assert sorted(expected) == sorted(["corpus.json", "lengths.npy", "report.jsonl", *shards])
    info = json.loads(expected["corpus.json"])
    assert [(shard["read"], shard["records"]) for shard in info["shards"]] == [(7, 7)] * 5 + [(7, 5)]
    first, second = map(json.loads, expected["report.jsonl"].splitlines())
    assert (first["file"], first["line"], first["record"]) == ("records.jsonl", RECORDS + 1, RECORDS)
    assert first["reason"] == "a record has either conversations or messages; its keys are ['id']"
    assert (second["line"], second["record"]) == (RECORDS + 3, RECORDS + 1)
    assert second["reason"].startswith("image 'none.png' does not exist below ")


def test_processes_make_the_same(source: Path, expected: dict[str, bytes], prepare: Any, model_files: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", workers=2, open_engine=functools.partial(open_engine, str(model_files)))
    assert contents(tmp_path / "out") == expected


class Killed(BaseException):
    """What no code catches."""


def test_it_goes_on_wherever_it_was_killed(
    source: Path, expected: dict[str, bytes], prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run dies a step later than the one before, at a file that it secures, renames or removes; then at the first again."""
    real: dict[str, Any] = {"rename": os.rename, "unlink": os.unlink, "fsync": os.fsync}
    left = 0

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real[name](*args, **options)

        return call

    out = tmp_path / "out"
    for deaths in range(1000):
        left = deaths % 7 + 1
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                prepare(source, out)
                break
            except Killed:
                assert not (out / "corpus.json").exists() or contents(out).items() >= expected.items()
    assert deaths > 2 * SHARDS and contents(out) == expected


PROGRAM = """
import sys
from blm_jax.data.command import prepare
from tests.data.corpora.material import open_engine

if __name__ == "__main__":
    source, out, model = sys.argv[1:]
    prepare(source, functools.partial(open_engine, model), out, workers=2, records_per_shard=7, max_bad=0.1)
"""


@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_process(shards: int, source: Path, expected: dict[str, bytes], prepare: Any, model_files: Path, tmp_path: Path) -> None:
    """The real thing: the process is killed while its workers write, and leaves them behind."""
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "out"
    arguments = [sys.executable, str(tmp_path / "program.py"), str(source), str(out), str(model_files)]
    process = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("data-*"))) < shards and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    prepare(source, out)
    time.sleep(0.2)  # for workers that were left behind, if any still writes
    assert contents(out) == expected


def test_what_is_done_is_not_done_again(
    source: Path, expected: dict[str, bytes], prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tmp_path / "out")
    monkeypatch.setattr(ShardMaker, "__call__", lambda *_: pytest.fail("it was begun again"))
    assert prepare(source, tmp_path / "out")["records"] == RECORDS
    assert contents(tmp_path / "out") == expected


def test_a_source_is_read_once(source: Path, prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = sources._read_file

    def counted(path: Any, file: Any) -> Iterator[Any]:
        opened.append(path.name)
        return real(path, file)

    monkeypatch.setattr(sources, "_read_file", counted)
    prepare(source, tmp_path / "out")
    assert opened == ["records.jsonl"]


# --- refused -------------------------------------------------------------------------------------------------------------------


def test_too_many_bad_records(source: Path, expected: dict[str, bytes], prepare: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match=r"2 of 42 records are bad, 4.76 %: .*--max-bad.* the first is records.jsonl:41: a record has"):
        prepare(source, out, max_bad=0.04)
    assert contents(out)["report.jsonl"] == expected["report.jsonl"] and not (out / "corpus.json").exists()
    with pytest.raises(RequestError, match="is not finished"):
        open_corpus(out)
    prepare(source, out, max_bad=0.05)  # goes on
    assert contents(out) == expected


def test_nothing_but_bad_records(prepare: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="3 of 3 records are bad"):
        prepare(write_lines(tmp_path / "a.jsonl", [{}, {}, 7]), tmp_path / "out", max_bad=1.0)
    with pytest.raises(RequestError, match="the source holds no record"):
        prepare(write_lines(tmp_path / "b.jsonl", []), tmp_path / "other")


def test_a_long_source_that_is_bad_ends_at_once(prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm_jax.data.corpora.prepare.ENOUGH", 10)
    with pytest.raises(RequestError, match="14 of 14 records are bad"):
        prepare(write_lines(tmp_path / "a.jsonl", [{}] * 1000), tmp_path / "out")


def test_what_a_broken_file_may_have_held_counts(prepare: Any, tmp_path: Path) -> None:
    """A list that breaks off after a tenth is no source with one bad record."""
    text = json.dumps([asked(f"Is it {i}?") for i in range(200)])
    place = len(text) // 10
    (tmp_path / "a.json").write_text(text[:place] + "#" + text[place + 1 :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", 512)
        with pytest.raises(RequestError, match=r"of .* records are bad, [89].* %"):
            prepare(tmp_path / "a.json", tmp_path / "out", max_bad=0.5)


@pytest.mark.parametrize("change", [{"records_per_shard": 8}, {"max_tokens": 500}, {"max_patches": 900}])
def test_other_settings(change: dict[str, Any], source: Path, prepare: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out)
    [name] = change
    with pytest.raises(RequestError, match=rf"was begun with other settings \({name}\): remove it"):
        prepare(source, out, **change)


def test_another_model(source: Path, prepare: Any, made_engine: PromptEngine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out)
    other = PromptEngine(made_engine.config, made_engine.tokenizer, replace(made_engine.pixels, max_pixels=28 * 28 * 50))
    with pytest.raises(RequestError, match=r"other settings \(MODEL's pixels\)"):
        prepare(source, out, open_engine=lambda: other)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("change", ["edited", "shorter", "longer"])
def test_a_source_that_has_changed(change: str, done: bool, prepare: Any, tmp_path: Path) -> None:
    records = [asked(f"Is it {i}?") for i in range(14)]
    path, out = write_lines(tmp_path / "a.jsonl", records), tmp_path / "out"
    if done:
        prepare(path, out)
    else:
        with pytest.raises(RequestError):
            prepare(write_lines(path, [*records, {}, {}, {}]), out)
        write_lines(path, records)
    changed = {"edited": [asked("Is it 0 now?"), *records[1:]], "shorter": records[:7], "longer": [*records, asked("Is it 14?")]}[change]
    write_lines(path, changed)
    if change == "edited" or done:
        with pytest.raises(RequestError, match=r"the source has (changed|become shorter) since"):
            prepare(path, out)
    else:
        shards = len(changed) // 7 + bool(len(changed) % 7)
        with pytest.raises(RequestError, match="has changed") if change == "longer" else contextlib.nullcontext():
            prepare(path, out)
            assert len(list(out.glob("data-*"))) == shards


def test_another_root(prepare: Any, tmp_path: Path) -> None:
    """Whether pictures were found there or not, and whether it was named or not."""
    path = write_lines(tmp_path / "list" / "a.jsonl", [asked(f"<image> {i}?", image="0.png") for i in range(6)])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(56, 56, len(name)))
    with pytest.raises(RequestError, match="6 of 6 records are bad"):
        prepare(path, tmp_path / "wrong")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with pytest.raises(RequestError, match=rf"begun with other settings \(root {path.parent}, not {one}\): remove it, or write to another"):
        prepare(path, tmp_path / "wrong", root=one)
    assert prepare(path, tmp_path / "out", root=one)["records"] == 6
    with pytest.raises(RequestError, match=rf"begun with other settings \(root {one}, not {two}\): remove it, or write to another"):
        prepare(path, tmp_path / "out", root=two)
    prepare(path, tmp_path / "out", root=os.path.relpath(one))  # the same by another name


def test_mended_pictures(prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again goes on with what was mended; good records are read once, unless their shard gains some."""
    records = [asked(f"<image> {i}?", image=f"{i}.png") for i in range(12)]
    path, out = write_lines(tmp_path / "a.jsonl", records), tmp_path / "out"
    pictures = {f"{i}.png": png(56, 56, i) for i in range(12)}
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(b"" if name == "2.png" else data)
    (tmp_path / "9.png").unlink()
    read: list[int] = []
    real = prepare_module.check_record
    monkeypatch.setattr(prepare_module, "check_record", lambda *given: read.append(1) or real(*given))
    for mended, bad, looks in ((None, 2, 12), (None, 2, 2), ("2.png", 1, 6), ("9.png", 0, 5)):
        if mended:
            (tmp_path / mended).write_bytes(pictures[mended])
        read.clear()
        with pytest.raises(RequestError, match=f"{bad} of 12 records are bad") if bad else contextlib.nullcontext():
            prepare(path, out, records_per_shard=4, max_bad=0.0)
        assert len(read) == looks
    prepare(path, tmp_path / "fresh")
    assert contents(out)["lengths.npy"] == contents(tmp_path / "fresh")["lengths.npy"]
    corpus = open_corpus(out)
    assert [corpus.stored(number).index for number in range(12)] == list(range(12)) and contents(out)["report.jsonl"] == b""


def test_a_shard_that_is_made_again_has_no_note(prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the shard and its note, and the picture is bad again: the old note would tell of fewer records than there are."""
    path = write_lines(tmp_path / "a.jsonl", [asked(f"<image> {i}?", image=f"{i}.png") for i in range(3)])
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(56, 56, i))
    with pytest.raises(RequestError, match="1 of 3"):
        prepare(path, tmp_path / "out", max_bad=0.0)
    (tmp_path / "2.png").write_bytes(png(56, 56, 2))

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepare_module, "write_whole", killed)
        prepare(path, tmp_path / "out", max_bad=0.0)
    (tmp_path / "2.png").unlink()
    assert prepare(path, tmp_path / "out", max_bad=0.5)["records"] == len(open_corpus(tmp_path / "out")) == 2
    assert open_corpus(tmp_path / "out").stored(1).index == 1


def test_directories_of_others_and_roots(source: Path, prepare: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds thesis.txt and no corpus: choose another directory"):
        prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out").keys() - {".lock"} == {"thesis.txt"}
    with pytest.raises(RequestError, match="cannot be written to: Not a directory"):
        prepare(source, tmp_path / "out" / "thesis.txt" / "corpus")
    with pytest.raises(RequestError, match="none does not exist: paths in records are to begin there"):
        prepare(source, tmp_path / "other", root=str(tmp_path / "none"))
    assert not (tmp_path / "other").exists()


def test_no_two_processes_write_to_one_corpus(source: Path, prepare: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match="is being written by another process"):
            prepare(source, tmp_path / "out")


def test_a_full_disk(source: Path, expected: dict[str, bytes], prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"data-00000.array_record cannot be written: .*No space left on device"):
            prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


# --- limits and other sources --------------------------------------------------------------------------------------------------


def test_limits(prepare: Any, source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "all")
    corpus = open_corpus(tmp_path / "all")
    longest, most = int(corpus.tokens.max()), int(corpus.patches.max())
    for limit, lengths, says in (
        ({"max_tokens": longest - 1}, corpus.tokens, f"more than the {longest - 1} allowed"),
        ({"max_patches": most - 1}, corpus.patches, f"more than the {most - 1} allowed"),
    ):
        out = tmp_path / next(iter(limit))
        result = prepare(source, out, max_bad=0.9, **limit)
        longer = int((lengths == lengths.max()).sum())
        assert result["bad"] == 2 + longer and longer > 0
        assert (out / "report.jsonl").read_text().count(says) == longer


def test_examples_of_tensorflow_datasets(prepare: Any, made_engine: PromptEngine, tmp_path: Path) -> None:
    directory = write_examples(tmp_path / "tfds")
    result = prepare(f"tfds:{directory}", tmp_path / "out", records_per_shard=2)
    assert (result["read"], result["records"], result["bad"]) == (3, 3, 0)
    corpus = open_corpus(tmp_path / "out")
    assert all(len(corpus.example(number, made_engine).pictures) == 1 for number in range(3))
    assert (corpus.stored(2).file, corpus.stored(2).line, corpus.stored(2).index) == ("talks/1.0.0/train", None, 2)
    assert prepare(f"tfds:{directory}", tmp_path / "out", records_per_shard=2) == result


def test_pictures_in_an_archive(prepare: Any, source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "media.zip", "w") as archive:
        for path in source.parent.iterdir():
            archive.write(path, path.name)
    lines = write_lines(tmp_path / "alone" / "records.jsonl", source.read_bytes().splitlines())
    prepare(lines, tmp_path / "out", root=str(tmp_path / "media.zip"))
    prepare(source, tmp_path / "folder")
    first, second = contents(tmp_path / "out"), contents(tmp_path / "folder")
    assert {name: data for name, data in first.items() if name.startswith(("data", "lengths"))} == {
        name: data for name, data in second.items() if name.startswith(("data", "lengths"))
    }
