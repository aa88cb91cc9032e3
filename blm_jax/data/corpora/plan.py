"""An epoch's plan: which records each of its packed sequences holds. Kept in a file, named for all that it depends on.

What depends on the number of hosts or on what was read before is not in it. The batch of any step, and the part of it that a
host reads, follow from the step alone: `Sequences`.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from blm_jax.data.corpora.budget import Budget
from blm_jax.data.corpora.packing import balanced, check_fits, dealt, pack, pools_of
from blm_jax.data.files import open_path, write_whole
from blm_jax.data.mixture import Mixture, shuffled

VERSION = 1  # of how plans are made: raise it with any change that makes other plans of the same records
HEADER = 11  # numbers: 8 of the fingerprint, sequences, records, CRC-32 of what follows


@dataclass(frozen=True)
class Plan:
    """The packed sequences of one epoch."""

    records: np.ndarray  # [records] uint32 of the mixture, those of a sequence together
    starts: np.ndarray  # [sequences + 1] uint32: of each sequence in `records`
    tokens: np.ndarray  # [sequences] uint32: what they hold
    patches: np.ndarray  # [sequences] uint32

    def __len__(self) -> int:
        return len(self.tokens)

    def sequence(self, index: int) -> np.ndarray:
        """Its records [n] uint32."""
        return self.records[self.starts[index] : self.starts[index + 1]]


def make_plan(mixture: Mixture, budget: Budget, seed: int, epoch: int, *, show: bool = False) -> Plan:
    check_fits(mixture, budget)
    drawn = mixture.draws(seed, epoch)
    packed = np.empty_like(drawn)
    counts = [np.zeros(0, np.int64)]
    with tqdm(total=len(drawn), unit=" records", unit_scale=True, desc=f"plan of epoch {epoch}", disable=not show, leave=False) as bar:
        for first, pools, size in pools_of(len(drawn)):
            part = slice(first, first + pools * size)
            block = drawn[part].reshape(pools, size)
            order, held = pack(mixture.tokens[block], mixture.patches[block], budget)
            packed[part] = drawn[part][order]
            counts.append(held)
            bar.update(block.size)
    del drawn
    return _arranged(mixture, packed, np.concatenate(counts), seed, epoch)


def _arranged(mixture: Mixture, packed: np.ndarray, counts: np.ndarray, seed: int, epoch: int) -> Plan:
    """The sequences of all pools in an order of their own: in a pool, those of large records come first."""
    if not len(counts):
        return Plan(packed, np.zeros(1, np.uint32), np.zeros(0, np.uint32), np.zeros(0, np.uint32))
    before = np.cumsum(counts) - counts
    tokens, patches = (np.add.reduceat(of[packed], before, dtype=np.uint32) for of in (mixture.tokens, mixture.patches))
    order = dealt(tokens, patches, shuffled(len(counts), "sequences", seed, epoch))
    counts = counts[order]
    starts = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(before[order] - starts[:-1], counts)
    places += np.arange(len(packed))
    return Plan(packed[places], starts.astype(np.uint32), tokens[order], patches[order])


# --- files ---------------------------------------------------------------------------------------------------------------


def fingerprint(mixture: Mixture, budget: Budget, seed: int, epoch: int) -> bytes:
    """SHA-256 of all that a plan depends on."""
    said = [VERSION, mixture.identity, budget.tokens, budget.patches, seed, epoch]
    return hashlib.sha256(json.dumps(said).encode()).digest()


def stored_plan(directory: epath.PathLike, mixture: Mixture, budget: Budget, seed: int, epoch: int, *, show: bool = False) -> Plan:
    """The plan from its file in `directory`; where there is none, or a damaged one, it is made and written.

    A local file is mapped into memory, so that the processes of a host share it, and one of them makes it while the others wait.
    """
    return _kept(directory, fingerprint(mixture, budget, seed, epoch), lambda: make_plan(mixture, budget, seed, epoch, show=show))


def _kept(directory: epath.PathLike, identity: bytes, make: Callable[[], Plan]) -> Plan:
    path = open_path(directory) / f"plan-{identity.hex()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return _read(path, identity)
    with _alone(path.parent):
        if path.exists():
            try:
                return _read(path, identity)  # made meanwhile
            except (OSError, ValueError, EOFError) as error:
                logging.getLogger(__name__).warning("%s is damaged and is made anew: %s", path, error)
        plan = make()
        write_whole(path, _to_bytes(plan, identity))
        return plan


@contextlib.contextmanager
def _alone(directory: epath.Path) -> Iterator[None]:
    """One process of a machine at a time, where the file system can tell; if it cannot, plans are made more often than needed."""
    with contextlib.ExitStack() as stack:
        if "://" not in os.fspath(directory):
            import fcntl

            with contextlib.suppress(OSError):
                directory.mkdir(parents=True, exist_ok=True)
                place = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, place)
                fcntl.flock(place, fcntl.LOCK_EX)
        yield


def _to_bytes(plan: Plan, identity: bytes) -> bytes:
    parts = [np.asarray(part, "<u4") for part in (plan.starts, plan.tokens, plan.patches, plan.records)]
    check = functools.reduce(lambda value, part: zlib.crc32(part.data, value), parts, 0)
    header = np.concatenate([np.frombuffer(identity, "<u4"), np.array([len(plan), len(plan.records), check], "<u4")])
    contents = io.BytesIO()
    np.lib.format.write_array_header_1_0(contents, {"descr": "<u4", "fortran_order": False, "shape": (len(header) + sum(map(len, parts)),)})
    for part in (header, *parts):
        contents.write(part.data)
    return contents.getvalue()


def _read(path: epath.Path, identity: bytes) -> Plan:
    in_bucket = "://" in os.fspath(path)
    numbers = np.load(io.BytesIO(path.read_bytes()) if in_bucket else path, mmap_mode=None if in_bucket else "r", allow_pickle=False)
    if numbers.dtype != np.dtype("<u4") or numbers.ndim != 1 or len(numbers) < HEADER:
        raise ValueError("it holds no plan")
    header, body = numbers[:HEADER], np.asarray(numbers[HEADER:])
    if header[:8].tobytes() != identity:
        raise ValueError("it is of other records or settings")
    sequences, records, check = (int(number) for number in header[8:])
    if len(body) != 3 * sequences + 1 + records or zlib.crc32(body.data) != check:
        raise ValueError("its contents have changed")
    starts, tokens, patches, packed = np.split(body, np.cumsum([sequences + 1, sequences, sequences]))
    return Plan(packed, starts, tokens, patches)


# --- batches -------------------------------------------------------------------------------------------------------------


class Sequences:
    """The packed sequences of all epochs in a row, and the batches that training takes from it, `batch` rows a step.

    Everything is a function of the seed and a number: nothing remembers what was read, and hosts only cut the batch. A batch that
    reaches beyond an epoch's end is filled from the next, so no record is left out.

    Plans are made here and mapped by the processes these sequences travel to, by way of a temporary directory if none was named.
    """

    def __init__(
        self,
        mixture: Mixture,
        budget: Budget,
        *,
        seed: int,
        batch: int,
        directory: epath.PathLike | None = None,
        show: bool = False,
        ends: tuple[int, ...] = (),
    ):
        self.mixture = mixture
        self.budget = budget
        self.seed = seed
        self.batch = batch
        self.directory = directory  # of the plans' files; None: plans are made and not kept
        self.show = show
        self._ends = list(ends)  # of each epoch known, in sequences since the first
        self._plans: dict[int, Future[Plan]] = {}  # the last ones asked for
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.RLock()  # threads that read ahead do not make a plan twice
        self._lent: tempfile.TemporaryDirectory | None = None  # where other processes find plans, if not in `directory`

    def __reduce__(self) -> tuple[Any, ...]:
        return self.elsewhere(), (self.mixture,)

    def elsewhere(self) -> Callable[[Mixture], Sequences]:
        """Makes these sequences of the same mixture in another process of this machine."""
        settings = {"seed": self.seed, "batch": self.batch, "directory": self._mapped(), "ends": tuple(self._ends)}
        return functools.partial(Sequences, budget=self.budget, **settings)

    def _mapped(self) -> str:
        """A directory of this machine with all plans that are known here: none is read from a bucket by every process."""
        if self.directory is not None and "://" not in os.fspath(self.directory):
            return os.fspath(self.directory)
        with self._lock:
            if self._lent is None:
                self._lent = tempfile.TemporaryDirectory(prefix="blm-plans-")
                for epoch, asked in self._plans.items():
                    _kept(self._lent.name, self._identity(epoch), asked.result)
            return self._lent.name

    def ready(self, step: int) -> None:
        """To be said as a batch is about to be read: the next epoch's plan is made while the second half of its own is read."""
        self.locate((step + 1) * self.batch - 1)
        epoch, number = self.locate(step * self.batch)
        if 2 * number >= self._ends[epoch] - self._first(epoch):
            self._asked(epoch + 1)

    def plan(self, epoch: int) -> Plan:
        return self._asked(epoch).result()

    def _asked(self, epoch: int) -> Future[Plan]:
        """The plan, which a thread of its own makes."""
        with self._lock:
            asked = self._plans.get(epoch)
            if asked is None or (asked.done() and asked.exception()):
                self._plans.pop(epoch, None)
                _keep_last(self._plans, 1)
                asked = self._plans[epoch] = Future()
                # Where it is kept is settled here: who lends plans holds the lock, and waits for those that are being made.
                directories = [place for place in (self.directory, self._lent and self._lent.name) if place is not None]
                threading.Thread(target=self._make, args=(epoch, directories, asked), daemon=True).start()
            return asked

    def _make(self, epoch: int, directories: list[epath.PathLike], asked: Future[Plan]) -> None:
        try:
            make = functools.partial(make_plan, self.mixture, self.budget, self.seed, epoch, show=self.show)
            for directory in directories:
                make = functools.partial(_kept, directory, self._identity(epoch), make)
            asked.set_result(make())
        except BaseException as error:
            asked.set_exception(error)

    def _identity(self, epoch: int) -> bytes:
        return fingerprint(self.mixture, self.budget, self.seed, epoch)

    def _first(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0

    def locate(self, index: int) -> tuple[int, int]:
        """The epoch of a sequence counted from the first of all, and its number in the plan of that epoch."""
        with self._lock:
            while not self._ends or index >= self._ends[-1]:
                self._ends.append(sum(self._ends[-1:]) + len(self.plan(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, index)
        return epoch, index - self._first(epoch)

    def order(self, step: int) -> np.ndarray:
        """Epoch and number of the sequence in each row of a step's batch, [batch, 2]: parts of the batch have equal work."""
        with self._lock:
            if step not in self._orders:
                _keep_last(self._orders, 63)
                self._orders[step] = self._make_order(step)
            return self._orders[step]

    def _make_order(self, step: int) -> np.ndarray:
        index, end = step * self.batch, (step + 1) * self.batch
        pieces = []
        while index < end:
            epoch, first = self.locate(index)
            plan = self.plan(epoch)
            part = slice(first, min(len(plan), first + end - index))
            numbers = np.arange(part.start, part.stop)
            pieces.append((np.full_like(numbers, epoch), numbers, plan.tokens[part], plan.patches[part]))
            index += len(numbers)
        epochs, numbers, tokens, patches = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return np.stack([epochs, numbers], axis=1)[balanced(tokens, patches)]

    def row(self, step: int, row: int) -> np.ndarray:
        """Records [n] in a row of a step's batch."""
        epoch, number = self.order(step)[row].tolist()
        return self.plan(epoch).sequence(number)

    def rows(self, step: int) -> list[np.ndarray]:
        """Records of all rows of a step's batch."""
        return [self.row(step, row) for row in range(self.batch)]


def _keep_last(cache: dict[int, Any], count: int) -> None:
    for key in list(cache)[: max(0, len(cache) - count)]:
        del cache[key]
