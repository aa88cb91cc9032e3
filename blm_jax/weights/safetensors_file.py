"""Files of the safetensors format: headers checked, byte ranges read, files planned and written piece by piece.

The format is eight bytes of length, a JSON header, and the tensors' bytes without holes. Reading it ourselves keeps
memory bounded (a mapping lives as long as one piece) and works in buckets, where nothing can be mapped.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from blm_jax.errors import RequestError
from blm_jax.weights.names import Shape, Slices

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 * 2**20  # the format's own limit
_STRIP = 16  # numbers: measured, 8 to 16 is best for two and four bytes


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: epath.Path
    dtype: np.dtype
    shape: Shape
    start: int  # byte in the file


@dataclass
class ByteCount:
    """Bytes asked of files: what shows that a host reads its own slices only."""

    read: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size: int) -> None:
        with self._lock:
            self.read += size


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def read_header(path: epath.Path) -> dict[str, Stored]:
    """Every tensor of a file. Raises where the file is not what its header says."""
    try:
        size = path.stat().length
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise RequestError(f"{path} is truncated or no safetensors file ({size} bytes); fetch it again")
            raw = file.read(length)
    except FileNotFoundError:
        raise RequestError(f"{path} is missing; fetch it, or mend the index that names it") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        spans = {name: _span(value) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} has a damaged header ({type(error).__name__}: {error}); fetch it again") from None
    end = 0
    found = {}
    for name, (code, shape, start, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if code not in DTYPES:
            raise RequestError(f"{path}: {name} has dtype {code}, not one of {', '.join(DTYPES)}: quantized weights are not read")
        if start != end or stop - start != math.prod(shape) * DTYPES[code].itemsize:
            raise RequestError(f"{path} has a damaged header: {name} {list(shape)} cannot be bytes {start} to {stop}; fetch it again")
        end = stop
        found[name] = Stored(path, DTYPES[code], shape, 8 + length + start)
    if 8 + length + end != size:
        state = "truncated" if size < 8 + length + end else "longer than it should be"
        raise RequestError(f"{path} is {state}: its header speaks of {8 + length + end} bytes, there are {size}; fetch it again")
    return found


def _span(value: Mapping[str, Any]) -> tuple[str, Shape, int, int]:
    """Dtype, shape, start and stop of one tensor, as the header has them."""
    code, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not isinstance(code, str) or not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"{code} {list(shape)} from {start} to {stop}")
    return code, shape, start, stop


def read_block(stored: Stored, shape: Shape, slices: Slices, count: ByteCount | None = None) -> np.ndarray:
    """A slice of a tensor seen as `shape`. Locally a view of mapped bytes: only the pages that are copied from are read."""
    itemsize = stored.dtype.itemsize
    strides = tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    lengths = tuple(part.stop - part.start for part in slices)
    first = sum(part.start * stride for part, stride in zip(slices, strides, strict=True))
    span = sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True)) + itemsize
    local = is_local(stored.file)
    data = (_mapped if local else _fetched)(stored.file, stored.start + first, span)
    if count is not None:
        count.add(math.prod(lengths) * itemsize if local else span)
    # As bytes, for a mapping need not begin where numbers of this dtype may lie.
    flat = np.frombuffer(data, np.uint8, span)
    return np.ndarray(lengths, stored.dtype, buffer=flat, strides=strides)


def _mapped(path: epath.Path, start: int, size: int) -> memoryview | bytes:
    offset = start - start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), start - offset + size, access=mmap.ACCESS_READ, offset=offset))[start - offset :]


def _fetched(path: epath.Path, start: int, size: int) -> memoryview | bytes:
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise RequestError(f"{path} is truncated: {size} bytes were wanted at {start}; fetch it again")
    return data


def copy_cast(block: np.ndarray, place: np.ndarray) -> None:
    """`place[...] = block`. NumPy moves plain integers quicker than bfloat16, and a turned matrix ten times quicker in strips."""
    if block.dtype == place.dtype:
        plain = np.dtype(f"u{block.dtype.itemsize}")
        block, place = block.view(plain), place.view(plain)
    last = min(range(place.ndim), key=lambda axis: (place.shape[axis] == 1, place.strides[axis]))  # along which `place` is contiguous
    step = place.shape[last] if block.strides[last] == block.itemsize else _STRIP
    for start in range(0, place.shape[last], step):
        strip = (slice(None),) * last + (slice(start, start + step),)
        place[strip] = block[strip].astype(place.dtype, copy=False)


@dataclass
class PlannedFile:
    """A file to be written: its tensors in order and its header."""

    name: str
    tensors: dict[str, tuple[np.dtype, Shape]] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        return sum(_bytes(dtype, shape) for dtype, shape in self.tensors.values())

    def header(self) -> bytes:
        """Tensors lie in the order of `tensors`; the padding puts the first on a multiple of eight."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this
        start = 0
        for name, (dtype, shape) in self.tensors.items():
            stop = start + _bytes(dtype, shape)
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw


def plan_files(tensors: Mapping[str, tuple[np.dtype, Shape]], limit: int) -> list[PlannedFile]:
    """Divide tensors over files of at most `limit` bytes of data (a larger tensor has a file of its own), in order."""
    groups: list[dict[str, tuple[np.dtype, Shape]]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        more = _bytes(dtype, shape)
        if groups[-1] and size + more > limit:
            groups.append({})
            size = 0
        groups[-1][name] = (dtype, shape)
        size += more
    # Wide numbers first, so that each tensor begins on a multiple of its own size.
    ordered = [dict(sorted(group.items(), key=lambda item: -item[1][0].itemsize)) for group in groups]
    return [PlannedFile(f"model-{number:05}-of-{len(ordered):05}.safetensors", group) for number, group in enumerate(ordered, 1)]


def _bytes(dtype: np.dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.itemsize
