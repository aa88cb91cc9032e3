"""Event files, as TensorBoard reads them: numbers by tag and step, framed as TFRecords.

A package for this would bring torch or tensorflow along wherever one of them is installed; the format is two small messages.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

VERSION = "brain.Event:2"  # from which on a file may say that it begins at a step, and readers forget what others had beyond it

# Fields of the messages, by their numbers in event.proto and summary.proto.
WALL_TIME, STEP, FILE_VERSION, SUMMARY, SESSION_LOG = 1, 2, 3, 5, 7
VALUE, TAG, SIMPLE_VALUE, STATUS, START = 1, 1, 2, 1, 1
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # how a field is written


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, reversed
        table.append(value)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, kind: int, value: bytes) -> bytes:
    return _varint(number << 3 | kind) + (_varint(len(value)) if kind == BYTES else b"") + value


def _event(step: int, what: bytes) -> bytes:
    head = _field(WALL_TIME, DOUBLE, struct.pack("<d", time.time())) + _field(STEP, VARINT, _varint(step))
    event = head + what
    length = struct.pack("<Q", len(event))
    return length + _masked_crc(length) + event + _masked_crc(event)


class EventFile:
    """A file of its own for each start of a run: what a kill leaves torn is the end of a file."""

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)
        # Files are read in the order of their names.
        path = directory / f"events.out.tfevents.{seconds:010d}.{rest:09d}.{os.getpid()}.{socket.gethostname()}"
        self._file = path.open("xb", buffering=0)
        self._file.write(_event(0, _field(FILE_VERSION, BYTES, VERSION.encode())))
        if first_step > 0:
            self._file.write(_event(first_step, _field(SESSION_LOG, BYTES, _field(STATUS, VARINT, _varint(START)))))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = b""
        for tag, value in values.items():
            one = _field(TAG, BYTES, tag.encode()) + _field(SIMPLE_VALUE, FLOAT, np.float32(value).tobytes())
            summary += _field(VALUE, BYTES, one)
        self._file.write(_event(step, _field(SUMMARY, BYTES, summary)))

    def close(self) -> None:
        self._file.close()
