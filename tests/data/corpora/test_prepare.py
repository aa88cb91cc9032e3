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
from tests.data.corpora.material import asked, open_engine, write_lines, write_source
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
    prepare(source, tmp_path / "out", workers=3, open_engine=functools.partial(open_engine, str(model_files)))
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
