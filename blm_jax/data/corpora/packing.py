"""Records into sequences of fixed budgets, by their lengths alone.

An epoch's shuffled records are packed by pools of some thousands: first-fit, the longest record of a pool first. (First-fit in
the order of arrival would make 2 % more sequences. By tokens alone is better than by both budgets: short texts then come last,
and find room in tokens that pictures left.) All pools go in step, a record of each at a time, so the loop is as long as a pool.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from blm_jax.config import VisionConfig
from blm_jax.data.corpora.budget import LARGEST, Budget, least_row, row_budget
from blm_jax.data.mixture import Mixture
from blm_jax.errors import RequestError

POOL = 4096  # records: of half as many, sequences are 0.3 % less full; twice as many take twice the time for 0.1 %
GROUP = 64  # sequences in a row among which there are as many heavy and light ones as anywhere else
SAMPLE = 4  # pools that tell how long vision rows should be
MORE = range(100, 109, 2)  # percent of what patches are to tokens in the mixture: lengths of rows that are tried
DECODER = 3  # times the work on a row of patches that the decoder has with a sequence's tokens: from 2 at 3B to 4 at 7B
TOGETHER = 256  # pools in step: what they work on stays in a processor's cache


def check_fits(mixture: Mixture, budget: Budget) -> None:
    for name, lengths, most in (("tokens", mixture.tokens, budget.tokens), ("patches of vision work", mixture.patches, budget.patches)):
        over = lengths > most
        if over.any():
            first = int(np.argmax(over))
            corpus, record = mixture.locate(np.array(first))
            raise RequestError(
                f"record {record} of corpus {mixture.corpora[corpus].shown} has {lengths[first]} {name}, a sequence holds {most} "
                f"({over.sum()} such records): make sequences longer, or prepare the corpus with that limit"
            )


def propose_row_length(mixture: Mixture, length: int, config: VisionConfig) -> int:
    """Patches of the vision row beside `length` tokens with which sequences are fullest; 0 if there are no pictures.

    The budgets want the proportion that patches and tokens have in the mixture, and patches a little more: much more is padding
    that the vision tower computes, too little leaves tokens empty. How much more, a sample shows. Single records may ask for
    rows longer than that; then fewer pixels for the largest, mostly videos, make all sequences fuller.
    """
    check_fits(mixture, Budget(length, LARGEST - 1))
    tokens, patches = mixture.work()
    if not patches:
        return 0
    sample = next(drawn for epoch in itertools.count() if len(drawn := mixture.draws(0, epoch)))[: SAMPLE * POOL]
    sample = sample[: len(sample) // POOL * POOL].reshape(-1, POOL) if len(sample) >= POOL else sample[None]
    lengths, works = mixture.tokens[sample], mixture.patches[sample]

    whole = mixture.whole

    def fullness(row: int) -> float:
        sequences = len(pack(lengths, works, Budget(length, row_budget(row, config, whole)))[1])
        return (DECODER * lengths.sum(dtype=np.int64) / length + works.sum(dtype=np.int64) / row) / sequences

    largest = int(mixture.patches.max())
    rows = {least_row(max(length * patches * percent // (100 * tokens), largest), config, whole) for percent in MORE}
    return max(sorted(rows), key=fullness)


def pools_of(count: int) -> Iterator[tuple[int, int, int]]:
    """How `count` shuffled records are cut: first record, pools, and records a pool of each block of pools in step."""
    if not count:
        return
    size = -(-count // max(1, round(count / POOL)))
    for first in range(0, count - count % size, size * TOGETHER):
        yield first, min(TOGETHER, (count - first) // size), size
    if count % size:
        yield count - count % size, 1, count % size


def pack(tokens: np.ndarray, patches: np.ndarray, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [pools, records] to records in the order of their sequences [pools * records], and how many each sequence holds."""
    pools, count = tokens.shape
    by_length = longest_first(tokens)
    bins = first_fit(np.take_along_axis(tokens, by_length, 1), np.take_along_axis(patches, by_length, 1), budget)
    keys = (bins.astype(np.int64) * count) + np.arange(count)  # by sequence, then as they came
    keys.sort(axis=1)
    order = np.take_along_axis(by_length, keys % count, 1) + np.arange(pools)[:, None] * count
    sequence = keys // count
    sequence += (np.cumsum(sequence[:, -1] + 1) - sequence[:, -1] - 1)[:, None]
    return order.ravel(), np.bincount(sequence.ravel())


def longest_first(tokens: np.ndarray) -> np.ndarray:
    """The records of each pool by tokens, [pools, records]. No two keys are equal, so any sort on any processor gives one result."""
    count = tokens.shape[1]
    keys = -tokens.astype(np.int64) * count + np.arange(count)
    keys.sort(axis=1)
    return keys % count


def first_fit(tokens: np.ndarray, patches: np.ndarray, budget: Budget) -> np.ndarray:
    """The sequence of its pool into which each record goes, [pools, records]: the first with room for it. All fit an empty one."""
    pools, count = tokens.shape
    # Narrow numbers: the time goes into looking through the room of all sequences.
    dtype = np.uint16 if max(budget.tokens, budget.patches) < 2**16 else np.uint32
    token_rows, patch_rows = (np.ascontiguousarray(array.T, dtype) for array in (tokens, patches))  # [records, pools]
    bins = np.empty((count, pools), np.int32)
    every = np.arange(pools)
    width = 16
    token_room, patch_room = _opened(pools, width, budget, dtype)
    fits, enough = np.empty((2, pools * width), bool)
    seen = 1  # sequences to look at: those begun in any pool, and one more
    for i in range(count):
        fit, more = (buffer[: pools * seen].reshape(pools, seen) for buffer in (fits, enough))
        np.greater_equal(token_room[:, :seen], token_rows[i][:, None], out=fit)
        np.greater_equal(patch_room[:, :seen], patch_rows[i][:, None], out=more)
        fit &= more
        first = fit.argmax(axis=1)
        token_room[every, first] -= token_rows[i]
        patch_room[every, first] -= patch_rows[i]
        bins[i] = first
        seen = max(seen, int(first.max()) + 2)
        if seen > width:
            width *= 2
            new_tokens, new_patches = _opened(pools, width // 2, budget, dtype)
            token_room, patch_room = np.hstack([token_room, new_tokens]), np.hstack([patch_room, new_patches])
            fits, enough = np.empty((2, pools * width), bool)
    return bins.T


def _opened(pools: int, width: int, budget: Budget, dtype: type[np.unsignedinteger]) -> tuple[np.ndarray, np.ndarray]:
    """Room for tokens and for patches of empty sequences, [pools, width] each."""
    return np.full((pools, width), budget.tokens, dtype), np.full((pools, width), budget.patches, dtype)


def dealt(tokens: np.ndarray, patches: np.ndarray, shuffle: np.ndarray) -> np.ndarray:
    """An order [sequences] as random as `shuffle`, but that of each GROUP in a row one is of every 64th part of all by vision work.

    So no batch has several of the few sequences that a pool's last records leave poorly filled.
    """
    groups = len(shuffle) // GROUP
    whole = shuffle[: groups * GROUP]
    parts = whole[np.lexsort((tokens[whole], patches[whole]))].reshape(GROUP, groups)
    # The shuffled numbers are the chance as well: which of a part goes to which group, and where in the group it comes.
    members = np.take_along_axis(parts, whole.reshape(GROUP, groups).argsort(axis=1), 1).T
    members = np.take_along_axis(members, whole.reshape(groups, GROUP).argsort(axis=1), 1)
    return np.concatenate([members.ravel(), shuffle[groups * GROUP :]])


def balanced(tokens: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """An order [sequences] of a batch, of which every part of a cut into 2, 4, 8, ... equal ones has its share of the work.

    The sequences, sorted by vision work, are dealt out to both halves, first to one, then to the other, then the other way
    round (1 4 5 8 | 2 3 6 7); then each half to its halves.
    """
    parts = np.lexsort((tokens, patches))[None]  # [parts, sequences]
    while parts.shape[1] and parts.shape[1] % 2 == 0:
        pairs = parts.reshape(len(parts), -1, 2).copy()
        pairs[:, 1::2] = pairs[:, 1::2, ::-1]
        parts = pairs.transpose(0, 2, 1).reshape(2 * len(parts), -1)
    return parts.ravel()
