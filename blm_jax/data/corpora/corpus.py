"""A prepared corpus: checked conversations with their pictures and videos, ready to be read in any order.

    corpus.json              what it was made of and for, and how many records each shard has; written last
    lengths.npy              [records, 2] uint32: tokens, and patches by `vision_work`
    data-00000.array_record  a record holds everything: no path leads out of it
    report.jsonl             the records that were left out, with file, line and reason

Pictures and videos are kept as the bytes they came as. A video's chosen frames would be larger than the video unless they were
compressed anew, which changes them, and how many are chosen would be settled for good; what training decodes from the bytes is what
`blm generate` sees of the same file.

A record is the length of its head (4 bytes, little endian), the head, which is JSON, and the bytes of its pictures one after the
other. Where the head's messages have a picture, it says {"bytes": i}: the i-th.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import secrets
import struct
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from blm_jax.data.chat import Tokenizer
from blm_jax.data.files import one_line, open_path, read_json
from blm_jax.data.mixture import Corpus
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.errors import RequestError, RunError

FORMAT = 1
INFO, LENGTHS, REPORT, PREPARING = "corpus.json", "lengths.npy", "report.jsonl", "preparing.json"
HEAD = struct.Struct("<I")
KEPT_OPEN = 64  # shards; each is a file descriptor
PROBE = "Wasn't it 12345?\r\n\r\n  It\u2019s 猫, naïve <|im_end|>"  # tokenizers of one vocabulary may cut words differently


@dataclass(frozen=True)
class Stored:
    """A record as it is kept."""

    messages: list[dict[str, Any]]  # as the prompt engine reads them, pictures and videos as bytes, videos of frames as lists of bytes
    file: str  # of the source
    line: int | None
    index: int


def encode_record(record: Stored) -> bytes:
    blobs: list[bytes] = []
    messages = _swapped(record.messages, lambda data: _keep(data, blobs) if isinstance(data, bytes) else data)
    head = dataclasses.asdict(dataclasses.replace(record, messages=[])) | {"messages": messages, "sizes": [len(blob) for blob in blobs]}
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join([HEAD.pack(len(text)), text, *blobs])


def decode_record(data: bytes) -> Stored:
    (length,) = HEAD.unpack_from(data)
    start = HEAD.size + length
    head = json.loads(data[HEAD.size : start])
    ends = start + np.cumsum([0, *head.pop("sizes")])
    blobs = [data[begin:end] for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    head["messages"] = _swapped(head["messages"], lambda place: blobs[place["bytes"]] if isinstance(place, dict) else place)
    return Stored(**head)


def _keep(data: bytes, blobs: list[bytes]) -> dict[str, int]:
    blobs.append(data)
    return {"bytes": len(blobs) - 1}


def _swapped(messages: Sequence[Mapping[str, Any]], swap: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The messages with each picture, video and frame replaced."""

    def part(part: Mapping[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind == "text":
            return dict(part)
        source = part[kind]
        return {**part, kind: [swap(frame) for frame in source] if isinstance(source, list) else swap(source)}

    return [{"role": message["role"], "content": [part(one) for one in message["content"]]} for message in messages]


def reading(engine: PromptEngine) -> dict[str, Any]:
    """What the lengths of records depend on: tokenizer, template and sizes of pictures."""
    tokenizer, vision = engine.tokenizer, engine.config.vision
    return {
        "tokenizer": _words(tokenizer),
        "template": hashlib.sha256((tokenizer.template or "").encode()).hexdigest(),
        "tokens": dataclasses.asdict(engine.config.tokens),
        # As JSON gives them back.
        "pixels": json.loads(json.dumps(dataclasses.asdict(engine.pixels))),
        "window": [vision.window_patches, vision.merge],
    }


@functools.lru_cache(maxsize=4)
def _words(tokenizer: Tokenizer) -> str:
    """Half a second, and each corpus of a mixture asks."""
    vocabulary = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    said = [vocabulary, tokenizer.encode(PROBE), sorted(tokenizer.names.items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


# --- writing -------------------------------------------------------------------------------------------------------------


def shard_name(number: int) -> str:
    return f"data-{number:05}.array_record"


@contextlib.contextmanager
def shard_writer(directory: epath.Path, number: int) -> Iterator[Callable[[bytes], None]]:
    """Takes records. The shard is there once the block is left, and not if it is left by an error."""
    in_bucket = "://" in os.fspath(directory)
    with contextlib.ExitStack() as stack:
        holder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if in_bucket else directory)
        partial = holder / f".{shard_name(number)}.{secrets.token_hex(4)}"
        stack.callback(partial.unlink, missing_ok=True)
        count = 0
        try:
            # Groups of one, as records are read one by one.
            writer = ArrayRecordWriter(str(partial), "group_size:1")

            def write(record: bytes) -> None:
                nonlocal count
                writer.write(record)
                count += 1

            yield write
            writer.close()
            if ArrayRecordReader(str(partial)).num_records() != count:
                raise RuntimeError("its end is missing")
            if in_bucket:
                epath.Path(partial).copy(directory / shard_name(number), overwrite=True)
            else:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.rename(directory / shard_name(number))
        except (RuntimeError, OSError) as error:  # the package raises RuntimeError alone
            raise RunError(f"{directory / shard_name(number)} cannot be written: {one_line(error)}") from error


def lengths_file(lengths: np.ndarray) -> bytes:
    contents = io.BytesIO()
    np.save(contents, np.asarray(lengths, "<u4").reshape(-1, 2), allow_pickle=False)
    return contents.getvalue()


# --- reading -------------------------------------------------------------------------------------------------------------


def open_corpus(path: epath.PathLike) -> PreparedCorpus:
    return PreparedCorpus(os.fspath(path))


class PreparedCorpus:
    """Threads may share it, and processes get their own by pickling: it holds nothing but what its files say."""

    def __init__(self, path: str):
        self.path = path
        self._directory = open_path(path)
        self.info = read_info(self._directory)
        self._lengths = _read_lengths(self._directory)
        self._starts = np.cumsum([0, *(shard["records"] for shard in self.info["shards"])])
        if len(self._lengths) != self._starts[-1]:
            raise RunError(f"{path} is damaged: {LENGTHS} has {len(self._lengths)} records, {INFO} {self._starts[-1]}; prepare it again")
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()  # the last ones used
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.path,)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> np.ndarray:
        """[records] uint32, those of pictures included."""
        return self._lengths[:, 0]

    @property
    def patches(self) -> np.ndarray:
        """[records] uint32, by `vision_work`."""
        return self._lengths[:, 1]

    @property
    def identity(self) -> str:
        """The same wherever the corpus lies."""
        said = {name: self.info[name] for name in ("read", "records", "tokens", "patches", "shards")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def in_mixture(self, share: Fraction = Fraction(1)) -> Corpus:
        return Corpus(self.identity, self.tokens, self.patches, share, bool(self.info.get("whole")), self.path)

    def check(self, engine: PromptEngine) -> None:
        """Lengths are those of one tokenizer, template and size of pictures: refuses an engine that has others."""
        now, then = reading(engine), self.info["settings"]["reading"]
        if other := [name for name in now if now[name] != then.get(name)]:
            raise RequestError(f"{self.path} was prepared for a model with another {', '.join(other)}: prepare it again with this MODEL")

    def record(self, index: int) -> list[dict[str, Any]]:
        """The messages of a record, with the bytes of its pictures and videos."""
        return self.stored(index).messages

    def example(self, index: int, engine: PromptEngine) -> Example:
        return engine.encode(self.record(index))

    def stored(self, index: int) -> Stored:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records and no {index}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            [data] = self._reader(shard).read([index - int(self._starts[shard])])
            return decode_record(data)
        except (RuntimeError, OSError, ValueError, KeyError, struct.error) as error:
            name = self._directory / shard_name(shard)
            raise RunError(f"{name} is damaged: {one_line(error)}; remove {self.path} and prepare it again") from error

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                reader = self._open(shard)
                if len(self._readers) >= KEPT_OPEN:
                    self._readers.popitem(last=False)  # closed when no thread reads from it any more
            self._readers[shard] = reader
            return reader

    def _open(self, shard: int) -> ArrayRecordReader:
        path = self._local(shard)
        reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768)
        # It takes a file that is cut off, or is not there, for an empty one.
        if reader.num_records() != self.info["shards"][shard]["records"]:
            raise OSError(f"it holds {reader.num_records()} of {self.info['shards'][shard]['records']} records")
        return reader

    def _local(self, shard: int) -> str:
        """The reader knows local files only: what lies in a bucket is brought here whole, once."""
        path = self._directory / shard_name(shard)
        if "://" not in os.fspath(path):
            return os.fspath(path)
        identity = hashlib.sha256(json.dumps(self.info, sort_keys=True).encode()).hexdigest()[:16]
        copy = Path.home() / ".cache" / "blm_jax" / "corpora" / identity / path.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}")
            try:
                path.copy(partial)
                partial.rename(copy)
            finally:
                partial.unlink(missing_ok=True)
        return os.fspath(copy)


def read_info(directory: epath.Path) -> dict[str, Any]:
    path = directory / INFO
    if not path.exists():
        if (directory / PREPARING).exists():
            raise RequestError(f"{directory} is not finished: run the same `blm data prepare` again, and it goes on")
        raise RequestError(f"{directory} is no corpus, as `blm data prepare` writes them: it has no {INFO}")
    info = read_json(path)
    if info.get("format") != FORMAT:
        raise RequestError(f"{path} is of format {info.get('format')!r}, and {FORMAT} is read: prepare it again")
    if not isinstance(info.get("shards"), list) or not isinstance(info.get("settings"), dict):
        raise RequestError(f"{path} is damaged: it has no shards or settings; prepare it again")
    return info


def _read_lengths(directory: epath.Path) -> np.ndarray:
    path = directory / LENGTHS
    try:
        in_bucket = "://" in os.fspath(path)
        lengths = np.load(io.BytesIO(path.read_bytes()) if in_bucket else path, mmap_mode=None if in_bucket else "r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path} cannot be read: {one_line(error)}; prepare the corpus again") from error
    if lengths.ndim != 2 or lengths.shape[1] != 2 or lengths.dtype != np.dtype("<u4"):
        raise RunError(f"{path} is damaged: it holds {lengths.dtype} {list(lengths.shape)}; prepare the corpus again")
    return lengths
