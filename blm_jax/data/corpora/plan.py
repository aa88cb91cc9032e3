"""An epoch's plan: which records each of its packed sequences holds. Kept in a file, named for all that it depends on.

What depends on the number of hosts or on what was read before is not in it. The batch of any step, and the part of it that a
host reads, follow from the step alone: `Sequences`.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
import logging
import os
import threading
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from blm_jax.data.corpora.budget import Budget
from blm_jax.data.corpora.packing import balanced, check_fits, dealt, pack, pools_of
from blm_jax.data.files import open_path, write_whole
from blm_jax.data.mixture import Mixture, shuffled
from blm_jax.errors import RequestError

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
    said = [VERSION, mixture.identity(), budget.tokens, budget.patches, seed, epoch]
    return hashlib.sha256(json.dumps(said).encode()).digest()


def stored_plan(directory: epath.PathLike, mixture: Mixture, budget: Budget, seed: int, epoch: int, *, show: bool = False) -> Plan:
    """The plan from its file in `directory`; where there is none, or a damaged one, it is made and written.

    A local file is mapped into memory, so that the processes of a host share it.
    """
    identity = fingerprint(mixture, budget, seed, epoch)
    path = open_path(directory) / f"plan-{identity.hex()[:16]}.npy"
    if path.exists():
        try:
            return _read(path, identity)
        except (OSError, ValueError, EOFError) as error:
            logging.getLogger(__name__).warning("%s is damaged and is made anew: %s", path, error)
    plan = make_plan(mixture, budget, seed, epoch, show=show)
    write_whole(path, _to_bytes(plan, identity))
    return plan


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

    Everything is a function of the seed and a number: nothing remembers what was read, and the number of hosts only cuts the
    batch. A batch that reaches beyond an epoch's end is filled from the next, so no record is left out.
    """

    def __init__(
        self, mixture: Mixture, budget: Budget, *, seed: int, batch: int, directory: epath.PathLike | None = None, show: bool = False
    ):
        if batch < 1:
            raise RequestError(f"a batch has {batch} rows: it must have at least 1")
        self.mixture = mixture
        self.budget = budget
        self.seed = seed
        self.batch = batch
        self.directory = directory  # of the plans' files; None: plans are made and not kept
        self.show = show
        self._ends: list[int] = []  # of each epoch known, in sequences since the first
        self._plans: dict[int, Plan] = {}  # the last ones asked for
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.RLock()  # threads that read ahead do not make a plan twice

    def __reduce__(self) -> tuple[Any, ...]:
        # To worker processes without plans: these they map from the files.
        make = functools.partial(Sequences, seed=self.seed, batch=self.batch, directory=self.directory)
        return make, (self.mixture, self.budget)

    def plan(self, epoch: int) -> Plan:
        with self._lock:
            if epoch not in self._plans:
                _keep_last(self._plans, 1)
                self._plans[epoch] = self._make(epoch)
            return self._plans[epoch]

    def _make(self, epoch: int) -> Plan:
        if self.directory is None:
            return make_plan(self.mixture, self.budget, self.seed, epoch, show=self.show)
        return stored_plan(self.directory, self.mixture, self.budget, self.seed, epoch, show=self.show)

    def locate(self, index: int) -> tuple[int, int]:
        """The epoch of a sequence counted from the first of all, and its number in the plan of that epoch."""
        with self._lock:
            while not self._ends or index >= self._ends[-1]:
                self._ends.append(sum(self._ends[-1:]) + len(self.plan(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, index)
        return epoch, index - (self._ends[epoch - 1] if epoch else 0)

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

    def rows(self, step: int, host: int = 0, hosts: int = 1) -> list[np.ndarray]:
        """Records of the rows that a host reads of a step's batch."""
        return [self.row(step, row) for row in self.host_rows(host, hosts)]

    def host_rows(self, host: int, hosts: int) -> range:
        """The rows of every batch that a host reads."""
        if self.batch % hosts:
            raise RequestError(f"{hosts} hosts cannot share a batch of {self.batch} rows evenly: choose a multiple of {hosts}")
        each = self.batch // hosts
        return range(host * each, (host + 1) * each)


def _keep_last(cache: dict[int, Any], count: int) -> None:
    for key in list(cache)[: max(0, len(cache) - count)]:
        del cache[key]
