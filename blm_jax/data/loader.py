"""Batches made ahead of the step that wants them, by threads or worker processes.

What step s reads is a function of s (`rows_of`), so all there is to remember is a number: a run goes on from it with other hosts
and other workers, and reads what it would have read.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import grain
import numpy as np
from absl import flags

from blm_jax.errors import RequestError

Row = TypeVar("Row", covariant=True)
ENDLESS = 2**62  # pieces: a run ends with its steps, not with its data
PIECES = 8  # that a host's part of a batch is read in, at least: handing one over costs more than reading a small row


class Rows(Protocol[Row]):
    """The rows of all batches there are. It travels to worker processes, so it pickles, and opens files where it is."""

    def host_rows(self, host: int, hosts: int) -> Sequence[int]:
        """Which rows of every batch a host reads."""
        ...

    def read(self, step: int, row: int) -> Row:
        """One row of a step's batch, as a batch of one row."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """Rows with work that is done in one process for all."""

    def ready(self, step: int) -> None:
        """Said before each batch is read, and before any process is started."""
        ...


def host_rows(batch: int, host: int, hosts: int) -> range:
    """The rows of every batch that a host reads, of as many hosts."""
    if batch < 1:
        raise RequestError(f"a batch has {batch} rows: it must have at least 1")
    if not 0 <= host < hosts or batch % hosts:
        raise RequestError(f"a batch of {batch} rows cannot be cut for host {host} of {hosts}: make it a multiple of the hosts")
    each = batch // hosts
    return range(host * each, (host + 1) * each)


@dataclass(frozen=True)
class _OfHost:
    """Rows as grain wants them: those of a host, some at a time, one step after the other."""

    rows: Rows[Any]
    own: Sequence[int]
    each: int  # rows of a piece; the last one of a step may have fewer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Here a worker process begins. Launchers tell all processes to stop, and the run saves first: it ends its workers itself."""
        if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.__dict__.update(state)

    def __len__(self) -> int:
        return ENDLESS

    @property
    def pieces(self) -> int:
        """Of each step."""
        return -(-len(self.own) // self.each)

    def __getitem__(self, index: int) -> Any:
        step, piece = divmod(int(index), self.pieces)
        own = self.own[piece * self.each : (piece + 1) * self.each]
        return _joined([_taken_apart(self.rows.read(step, row)) for row in own])


class Loader(Generic[Row]):
    """Batches from step `start` on. `workers` 0 reads with threads of this process; pictures are worth processes."""

    def __init__(
        self,
        rows: Rows[Row],
        *,
        start: int = 0,
        host: int = 0,
        hosts: int = 1,
        own: Sequence[int] | None = None,
        workers: int = 0,
        ahead: int = 2,
    ):
        """`own` are the rows of each batch that are read; without them, those of a host."""
        if start < 0 or workers < 0 or ahead < 1:
            raise RequestError(f"a loader starts at step {start} with {workers} workers, {ahead} batches ahead: 0, 0 and 1 are the least")
        self.step = start
        self.waited = 0.0  # seconds, for the last batch
        own = rows.host_rows(host, hosts) if own is None else own
        self._rows, self._of_host = rows, _OfHost(rows, own, -(-len(own) // max(PIECES, workers)))
        self._workers, self._ahead = workers, ahead
        self._iterator: Iterator[Any] | None = None

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the next step."""
        return {"step": self.step}

    def __iter__(self) -> Loader[Row]:
        return self

    def __next__(self) -> Row:
        start = time.perf_counter()
        try:
            if isinstance(self._rows, Preparing):
                self._rows.ready(self.step)
            if self._iterator is None:
                self._iterator = self._begin()
            parts = [next(self._iterator) for _ in range(self._of_host.pieces)]
        except BaseException:
            self.close()  # in the middle of a batch: whoever goes on in spite of it begins this one again
            raise
        self.waited = time.perf_counter() - start
        self.step += 1
        return _whole(_joined(parts))

    def _begin(self) -> Iterator[Any]:
        pieces = self._of_host.pieces
        dataset = grain.MapDataset.source(self._of_host)[self.step * pieces :]
        buffered = self._ahead * pieces
        if not self._workers:
            return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=min(4, buffered), prefetch_buffer_size=buffered)))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands them on to its processes
        rows = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        each = -(-buffered // self._workers)
        return iter(rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=each)))

    def close(self) -> None:
        """Ends threads and processes; the next batch starts them again."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator = None


# --- rows to batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Apart:
    """A structure without its arrays, which grain passes between processes through shared memory."""

    kind: type
    rest: dict[str, Any]


def _taken_apart(value: Any) -> Any:
    """Nested dataclasses of arrays as nested dicts of arrays; what they were stands in the first key of each."""
    if not hasattr(value, "__dataclass_fields__"):
        return value
    parts = {field.name: _taken_apart(getattr(value, field.name)) for field in fields(value)}
    arrays = {name: part for name, part in parts.items() if isinstance(part, np.ndarray | dict)}
    return {"": _Apart(type(value), {name: part for name, part in parts.items() if name not in arrays}), **arrays}


def _joined(parts: Sequence[Any]) -> Any:
    """Several rows that were taken apart, one after the other, as one that was."""
    first = parts[0]
    if not isinstance(first, np.ndarray | dict):
        raise TypeError(f"rows are made of arrays, not of {type(first).__name__}")
    if len(parts) == 1:
        return first
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    apart: _Apart = first[""]
    rest = dict(apart.rest)
    if "groups" in rest:  # of vision rows: a group a text row
        rest["groups"] = sum(part[""].rest["groups"] for part in parts)
    return {"": _Apart(apart.kind, rest), **{name: _joined([part[name] for part in parts]) for name in first if name}}


def _whole(value: Any) -> Any:
    """What was taken apart, as it was."""
    if not isinstance(value, dict):
        return value
    apart: _Apart = value[""]
    return apart.kind(**{name: _whole(part) for name, part in value.items() if name}, **apart.rest)


def joined(parts: Sequence[Row]) -> Row:
    """One batch of several, row after row."""
    return _whole(_joined([_taken_apart(part) for part in parts]))
