"""Files of records: each record once, with its place; a broken one alone is bad, and what cannot be read is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm_jax.data.corpora import sources
from blm_jax.data.corpora.conversations import read_record
from blm_jax.data.corpora.sources import Examples, Item, JsonFiles, Source, open_source
from blm_jax.errors import RequestError
from tests.data.corpora.material import png

RECORDS = [{"a": 1}, {"b": 'ü\n\u2028 \\" }] ,'}, {"c": [1, [2, {"d": None}]]}]


def items(source: Source) -> list[Item]:
    return [item for piece in source.pieces(2) for item in piece.items]


def read_all(path: Path) -> tuple[list[Any], list[Item]]:
    """The records of a file, and the items that are none."""
    source = open_source(str(path))
    found = items(source)
    return [source.read(item) for item in found if not item.problem], [item for item in found if item.problem]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", lines(RECORDS)),
        ("a.ndjson", lines(RECORDS).rstrip()),
        ("a.jsonl", "\ufeff\n" + lines(RECORDS).replace("\n", "\r\n\r\n")),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=3, ensure_ascii=False)),
        ("a.json", "\ufeff \n" + json.dumps(RECORDS, ensure_ascii=False) + "\n\n"),
        ("a.json", lines(RECORDS)),  # a record a line, in spite of the name
        ("a.json", "".join(json.dumps(record, indent=1) for record in RECORDS)),  # one behind the other
        ("a.JSON", json.dumps(RECORDS)),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_forms_of_files(name: str, contents: str, zipped: bool, tmp_path: Path) -> None:
    data = contents.encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_all(path) == (RECORDS, [])


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name, contents in (("a.jsonl", "\n\n"), ("b.json", "[]"), ("c.json", " [ ]\n"), ("d.json", "")):
        (tmp_path / name).write_text(contents)
        assert read_all(tmp_path / name) == ([], [])
    assert list(open_source(str(tmp_path)).pieces(4)) == []


def test_places(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('\n{"x": 1}\n\n{"x": 2}\n')
    (tmp_path / "a.json").write_text('[\n{"x": 1,\n"y": 2},\n\n {"x": 2}, {"x": 3}]')
    (tmp_path / "c.txt").write_text("no records")
    (tmp_path / ".d.jsonl").write_text("nor here")
    source = open_source(str(tmp_path))
    assert isinstance(source, JsonFiles)
    assert [(item.file, item.line, item.index) for item in items(source)] == [
        ("a.json", 2, 0),
        ("a.json", 5, 1),
        ("a.json", 5, 2),
        ("b.jsonl", 2, 0),
        ("b.jsonl", 4, 1),
    ]
    pieces = list(source.pieces(2))
    assert [(piece.number, len(piece.items)) for piece in pieces] == [(0, 2), (1, 2), (2, 1)]
    assert sum(piece.size for piece in pieces) == source.size == sum(file.stat().st_size for file in map(Path, source.paths))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=5), values, max_size=3)


@given(st.lists(objects, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_a_list_is_read_piece_by_piece(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], indent: int | None, escaped: bool, block: int
) -> None:
    """Wherever the blocks that are read end: within numbers, escapes, characters."""
    path = tmp_path_factory.mktemp("list") / "a.json"
    text = json.dumps(records, indent=indent, ensure_ascii=escaped)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        source = open_source(str(path))
        found = items(source)
        assert [source.read(item) for item in found] == records
    begun = 0
    for item in found:
        begun = data.index(item.text, begun)
        assert item.line == data[:begun].count(b"\n") + 1
        begun += len(item.text)


@pytest.mark.parametrize("line", [b"{", b'{"a": \xff}', b"nothing", b'{"a": 1} {"b": 2}', b"[" * 100_000, b"9" * 5000, b"\x00"])
def test_a_broken_line_is_one_bad_record(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    source = open_source(str(path))
    first, broken, last = items(source)
    assert (source.read(first), source.read(last), broken.line) == ({"a": 1}, {"a": 2}, 2)
    with pytest.raises(RequestError, match="no JSON") as caught:
        source.read(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "says", "line"),
    [
        (b'[{"a": 1},\n{"a": 2},\n{"a" 3}, {"a": 4}]', "no JSON: Expecting ':' delimiter", 3),
        (b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', "'{' where a comma or ] should be", 3),
        (b'[{"a": 1},\n{"a": 2},\n{"a": 3', "no JSON", 3),
        (b'[{"a": 1},\n{"a": 2}\n', "the list is not closed", 3),
        (b'[{"a": 1},\n{"a": 2},\n', "no JSON", 3),
        (b'[{"a": 1},\n{"a": 2},\n' + b"[" * 100_000, "recursion", 3),
    ],
)
def test_a_list_that_breaks_off(contents: bytes, says: str, line: int, tmp_path: Path) -> None:
    """What comes before is read; the rest is one bad record, which counts as as many as it may hold."""
    (tmp_path / "a.json").write_bytes(contents)
    records, [broken] = read_all(tmp_path / "a.json")
    assert records == [{"a": 1}, {"a": 2}]
    assert says in broken.problem and "from here on the file cannot be read" in broken.problem
    assert (broken.line, broken.index) == (line, 2) and broken.lost >= 1


def test_one_bad_character_spoils_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": "\xff"}, {"a": 3}]')
    source = open_source(str(tmp_path / "a.json"))
    first, bad, last = items(source)
    assert (source.read(first), source.read(last)) == ({"a": 1}, {"a": 3})
    with pytest.raises(RequestError, match="no JSON: 'utf-8' codec can't decode"):
        source.read(bad)


def test_a_zipped_file_that_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = gzip.compress("".join(f'{{"a": "{rng.bytes(40).hex()}"}}\n' for _ in range(2000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", 4096)
        records, [broken] = read_all(tmp_path / "a.jsonl.gz")
    assert 900 < len(records) < 1100 and broken.index == len(records)
    assert "from here on the file cannot be read" in broken.problem
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    assert [item.problem.partition(";")[0] for item in read_all(tmp_path / "b.jsonl.gz")[1]] == ["Not a gzipped file (b'no')"]


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * 1000 + b'\n{"a": 2}\n')
    records, [long] = read_all(tmp_path / "a.jsonl")
    assert records == [{"a": 1}, {"a": 2}] and long.problem == "a line of more than 100 bytes" and long.line == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none", "none does not exist"),
        ("a.txt", "is none of .json, .jsonl, .ndjson"),
        ("empty", "holds no file of .json"),
        ("ftp://x", "no such kind of path"),
        ("tfds:none", "tfds:none cannot be opened"),
    ],
)
def test_sources_that_are_none(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=says) as caught:
        open_source(name if ":" in name else str(tmp_path / name))
    assert "\n" not in str(caught.value)


# --- tensorflow-datasets -----------------------------------------------------------------------------------------------------


def write_examples(directory: Path, *, splits: tuple[str, ...] = ("train",), several: bool = False) -> Path:
    """A data set of three conversations about a picture each, or about one, two and three."""
    import tensorflow_datasets as tfds

    picture: Any = tfds.features.Image(shape=(None, None, 3))

    class Talks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar[Any] = {}  # nothing is downloaded

        def _info(self) -> Any:
            turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
            pictures = {"images": tfds.features.Sequence(picture)} if several else {"image": picture}
            parts = {**pictures, "conversations": tfds.features.Sequence(turn), "id": np.int64}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(parts))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self) -> Any:
            for i in range(3):
                count = i + 1 if several else 1
                said = [{"from": "human", "value": f"{'<image>' * count} nr. {i} ü?"}, {"from": "gpt", "value": "Yes."}]
                pictures = [png(20 + i, 30, seed) for seed in range(count)]
                yield i, {**({"images": pictures} if several else {"image": pictures[0]}), "conversations": said, "id": i}

    builder = Talks(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.mark.parametrize("several", [False, True])
def test_examples_of_tensorflow_datasets(several: bool, tmp_path: Path) -> None:
    directory = write_examples(tmp_path, several=several)
    source = open_source(f"tfds:{directory}")
    assert isinstance(source, Examples) and source.root == str(directory)
    found = items(source)
    assert [(item.line, item.index) for item in found] == [(None, 0), (None, 1), (None, 2)]
    seen = set()
    for item in found:
        record = source.read(item)
        number = record["id"]
        seen.add(number)
        pictures = [{"type": "image", "source": png(20 + number, 30, seed)} for seed in range(number + 1 if several else 1)]
        question = {"type": "text", "text": f" nr. {number} ü?"}
        assert read_record(record) == [("user", [*pictures, question]), ("assistant", [{"type": "text", "text": "Yes."}])]
    assert seen == {0, 1, 2}
    pieces = list(source.pieces(2))
    assert [piece.size for piece in pieces] == [2, 1] and source.size == 3
    assert pieces == list(open_source(f"tfds:{directory}").pieces(2))


def test_examples_that_are_not_read(tmp_path: Path) -> None:
    directory = write_examples(tmp_path, splits=("left", "right"))
    with pytest.raises(RequestError, match="has the splits left, right and no train"):
        open_source(f"tfds:{directory}")
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(RequestError, match="is stored as tfrecord: only array_record is read"):
        open_source(f"tfds:{directory}")


def test_json_files_pickle() -> None:
    """Workers are given the source."""
    import pickle

    source = JsonFiles(("a.jsonl",))
    assert pickle.loads(pickle.dumps(source)) == source
