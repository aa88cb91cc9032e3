"""Where records come from: JSON and JSONL files, plain or gzipped, and data sets of tensorflow-datasets in ArrayRecord.

A source is read once, in pieces of so many records each. Only the text of a record is read here, in one process; what is in it is
found out by the workers.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from blm_jax.data.corpora.conversations import TURNS
from blm_jax.data.files import one_line, open_path
from blm_jax.errors import RequestError

SUFFIXES = (".json", ".jsonl", ".ndjson")
BLOCK = 2**20  # bytes of a JSON list that are read at a time
LONGEST = 2**30  # bytes of a record's text
TFDS = "tfds:"
SPACES = re.compile(r"[ \t\r\n]*")
SCAN = json.JSONDecoder().raw_decode
REST = -1  # lost: all that follows, to be estimated
BROKEN = (OSError, EOFError, zlib.error)  # what a damaged file raises


@dataclass(frozen=True)
class Item:
    """A record of a source, not yet read."""

    file: str
    line: int | None  # where it begins, from 1
    index: int  # among the records of the file, from 0
    text: bytes = b""
    problem: str = ""  # why there is none
    lost: int = 1  # records that are not read for it: where a file cannot be read on, as many as the rest of it may hold


@dataclass(frozen=True)
class Piece:
    number: int
    items: tuple[Item, ...]
    digest: str  # SHA-256 of what was read
    size: int  # of the source's size, for the progress bar


@dataclass(frozen=True)
class JsonFiles:
    paths: tuple[str, ...]
    unit = "B"

    @property
    def size(self) -> int:
        return sum(epath.Path(path).stat().length for path in self.paths)

    @property
    def root(self) -> str:
        """Where paths in records begin, unless the user says something else."""
        return os.fspath(epath.Path(self.paths[0]).parent)

    def pieces(self, records: int) -> Iterator[Piece]:
        return _pieces(self._items(), records)

    def _items(self) -> Iterator[tuple[Item, int]]:
        """Each with the bytes that were read for it."""
        for name in self.paths:
            path = epath.Path(name)
            with path.open("rb") as file:
                before, whole = 0, path.stat().length
                for item in _read_file(path, file):
                    place = file.tell()  # of the compressed file, if it is one
                    if item.lost == REST:
                        begun = max(before, 1)
                        item = replace(item, lost=1 + (whole - begun) * item.index // begun)
                    yield item, place - before
                    before = place

    def read(self, item: Item) -> Any:
        try:
            return json.loads(item.text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"no JSON: {one_line(error)}") from error


@dataclass(frozen=True)
class Examples:
    """A split of a data set that tensorflow-datasets has prepared."""

    directory: str
    split: str
    name: str
    size: int
    identity: str
    unit = " records"

    @property
    def root(self) -> str:
        return self.directory

    def pieces(self, records: int) -> Iterator[Piece]:
        return _pieces(((Item(self.name, None, i), 1) for i in range(self.size)), records, self.identity)

    def read(self, item: Item) -> Any:
        examples, pictures = self._examples
        try:
            example = examples[item.index]
        except Exception as error:  # features of the user's own may raise anything
            raise RequestError(f"the example cannot be decoded: {one_line(error)}") from error
        return {key: _listed(value) if key in pictures else plain(value, key) for key, value in example.items()}

    @cached_property
    def _examples(self) -> tuple[Any, frozenset[str]]:
        """The split, and its features that are pictures or lists of them."""
        import tensorflow_datasets as tfds

        class Encoded(tfds.decode.SkipDecoding):
            """Pictures stay the bytes they are, in lists too."""

            def decode_batch_example_np(self, batch: Any) -> Any:
                return batch

        builder: Any = tfds.builder_from_directory(self.directory)
        # A Video is a list of pictures.
        pictures = [
            key for key, value in builder.info.features.items() if isinstance(getattr(value, "feature", value), tfds.features.Image)
        ]
        return builder.as_data_source(self.split, decoders={key: Encoded() for key in pictures} or None), frozenset(pictures)


Source = JsonFiles | Examples


def open_source(source: str) -> Source:
    if source.startswith(TFDS):
        return _open_examples(source.removeprefix(TFDS))
    path = open_path(source)
    if not path.exists():
        raise RequestError(f"{source} does not exist")
    if not path.is_dir():
        if not _is_json(path):
            raise RequestError(f"{source} is none of {', '.join(SUFFIXES)} (or these with .gz), and no directory of such files")
        return JsonFiles((os.fspath(path),))
    files = sorted(os.fspath(file) for file in path.iterdir() if _is_json(file) and not file.name.startswith("."))
    if not files:
        raise RequestError(f"{source} holds no file of {', '.join(SUFFIXES)} (or these with .gz)")
    return JsonFiles(tuple(files))


def _is_json(path: epath.Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _pieces(items: Iterator[tuple[Item, int]], records: int, identity: str = "") -> Iterator[Piece]:
    """Pieces of so many records; `identity` stands for what items do not hold."""
    held: list[Item] = []
    digest, size, number = hashlib.sha256(identity.encode()), 0, 0
    for item, read in items:
        held.append(item)
        digest.update(f"{item.file}\n{item.line}\n{item.index}\n{item.problem}\n{len(item.text)}\n".encode())
        digest.update(item.text)
        size += read
        if len(held) == records:
            yield Piece(number, tuple(held), digest.hexdigest(), size)
            held, digest, size, number = [], hashlib.sha256(identity.encode()), 0, number + 1
    if held:
        yield Piece(number, tuple(held), digest.hexdigest(), size)


# --- JSON ----------------------------------------------------------------------------------------------------------------


def _read_file(path: epath.Path, file: Any) -> Iterator[Item]:
    name = path.name
    index, line = 0, 1
    try:
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file) if name.lower().endswith(".gz") else file, BLOCK)  # type: ignore[type-var]
        by_line = not name.lower().removesuffix(".gz").endswith(".json") or _begins_with_a_line(stream.peek(BLOCK))
        for item in (_lines if by_line else _elements)(name, stream):
            yield item
            index, line = item.index + 1, item.line or 1
    except BROKEN as error:
        yield _break(name, line, index, one_line(error))


def _break(name: str, line: int, index: int, problem: str) -> Item:
    """In place of all that follows in a file."""
    return Item(name, line, index, problem=f"{problem}; from here on the file cannot be read", lost=REST)


def _begins_with_a_line(start: bytes) -> bool:
    """Whether a .json file holds a record a line, in spite of its name."""
    line, end, _ = start.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    try:
        return bool(end) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lines(name: str, stream: Any) -> Iterator[Item]:
    number = index = 0
    while line := stream.readline(LONGEST):
        number += 1
        rest = line
        while len(rest) == LONGEST and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST)
        text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
        if rest is not line:
            yield Item(name, number, index, problem=f"a line of more than {LONGEST} bytes")
        elif text:
            yield Item(name, number, index, text)
        else:
            continue  # an empty line is no record
        index += 1


class _Text:
    """The text of a file, of which only what is being read is held."""

    def __init__(self, stream: Any):
        self._stream = stream
        # What is no UTF-8 comes out of `encode` as it was, so that the one record it is in is bad.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self.text, self.place, self.line, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read on: as much again as is held, so that a long record is not parsed from its beginning too often."""
        if self.ended:
            return False
        self.text, self.place = self.text[self.place :], 0
        block = self._stream.read(max(BLOCK, len(self.text)))
        self.ended = not block
        self.text += self._decoder.decode(block, final=self.ended)
        return True

    def skip(self, end: int) -> str:
        skipped = self.text[self.place : end]
        self.line += skipped.count("\n")
        self.place = end
        return skipped

    def next_sign(self) -> str:
        """The next character that is no white space, and is not taken; none at the end."""
        while True:
            spaces = SPACES.match(self.text, self.place)
            assert spaces is not None
            self.skip(spaces.end())
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""


def _elements(name: str, stream: Any) -> Iterator[Item]:
    """The elements of a JSON list one by one, or the values of a file that writes one behind the other."""
    text, index = _Text(stream), 0
    in_list = text.next_sign() == "["
    if in_list:
        text.skip(text.place + 1)
        if text.next_sign() == "]":
            in_list = False
            text.skip(text.place + 1)
    while text.next_sign() or in_list:
        line = text.line
        element, problem = _element(text)
        if problem:
            yield _break(name, line, index, f"no JSON: {problem}")
            return
        yield Item(name, line, index, element)
        index += 1
        if in_list and (sign := text.next_sign()) in (",", "]"):
            in_list = sign == ","
            text.skip(text.place + 1)
        elif in_list:
            yield _break(name, text.line, index, f"{sign!r} where a comma or ] should be" if sign else "the list is not closed")
            return


def _element(text: _Text) -> tuple[bytes, str]:
    """The next value as it is written, or why there is none."""
    while True:
        try:
            _, end = SCAN(text.text, text.place)
            problem = ""
        except json.JSONDecodeError as error:
            end, problem = len(text.text), error.msg
        except (ValueError, RecursionError) as error:  # it cannot become better by reading on
            return b"", one_line(error)
        # A number may go on beyond what is held, and what is cut off is no JSON yet.
        if end < len(text.text) or text.ended:
            return (b"", problem) if problem else (text.skip(end).encode("utf-8", "surrogateescape"), "")
        if len(text.text) - text.place > LONGEST:
            return b"", problem or f"a record of more than {LONGEST} characters"
        text.more()


# --- tensorflow-datasets -------------------------------------------------------------------------------------------------


def _open_examples(name: str) -> Examples:
    """Of a directory that holds a prepared data set, or of the name of one below tensorflow-datasets' own folder."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(name) if open_path(name).is_dir() else tfds.builder(name)
        splits = {split: int(info.num_examples) for split, info in builder.info.splits.items()}
        form = getattr(builder.info.file_format, "value", builder.info.file_format)
    except Exception as error:  # it raises many kinds, with explanations of many lines
        raise RequestError(f"{TFDS}{name} cannot be opened: {str(error).strip().partition(chr(10))[0]}") from error
    if not splits:
        raise RequestError(f"{TFDS}{name} is not prepared: run `tfds build --file_format=array_record`, or name its directory")
    if form != "array_record":
        raise RequestError(f"{TFDS}{name} is stored as {form}: only array_record is read; `tfds convert_format` makes it")
    split = "train" if "train" in splits else next(iter(splits))
    if "train" not in splits and len(splits) > 1:
        raise RequestError(f"{TFDS}{name} has the splits {', '.join(splits)} and no train: which one to take is not known")
    info = builder.info
    identity = f"{info.full_name} {split} {splits[split]} {info.splits[split].num_bytes} {list(info.splits[split].shard_lengths)}"
    return Examples(os.fspath(builder.data_dir), split, f"{info.full_name}/{split}", splits[split], identity)


def plain(value: Any, key: str = "") -> Any:
    """What tensorflow-datasets gives, as a JSON file would have it: texts for bytes, and a list of turns for their columns."""
    if isinstance(value, Mapping):
        columns = {name: plain(inner, name) for name, inner in value.items()}
        return _rows(columns) if key in TURNS else columns
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.dtype == object):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _listed(value: Any) -> Any:
    """Bytes of pictures as a list of them, if they are several."""
    return value if isinstance(value, bytes) else list(value)


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    if len({len(column) if isinstance(column, list) else -1 for column in columns.values()} - {-1}) != 1:
        raise RequestError(f"the turns of an example are columns of different lengths: {', '.join(sorted(columns))}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
