"""Several corpora as one stream of records: which of them an epoch holds, and in which order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from blm_jax.errors import RequestError

FINEST = 10**6  # shares are fractions with denominators up to this, so that they add up exactly
SCRAMBLE = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shifts and factors of splitmix64
STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Corpus:
    """The lengths of a corpus's records, known since it was prepared."""

    name: str
    tokens: np.ndarray  # [records], those of pictures included
    patches: np.ndarray  # [records], by `vision_work`
    share: Fraction = Fraction(1)  # of its records that an epoch takes; 2 is all of them twice
    whole: bool = False  # each window of its pictures is full, see `corpora.budget`
    path: str = ""  # for messages: the name, which decides the order of records, may be one that says nothing to a reader

    def __post_init__(self) -> None:
        shapes = self.tokens.shape, self.patches.shape
        if shapes[0] != shapes[1] or self.tokens.ndim != 1 or any(array.dtype.kind not in "iu" for array in (self.tokens, self.patches)):
            raise ValueError(f"lengths of {self.name} are of shapes {shapes}: two equal rows of whole numbers are needed")
        if not len(self.tokens):
            raise RequestError(f"corpus {self.shown} has no records: prepare it again, or leave it out of the mixture")
        if self.tokens.min() < 1 or self.patches.min() < 0 or max(self.tokens.max(), self.patches.max()) >= 2**32:
            raise RequestError(f"corpus {self.shown} has a record without tokens, or a length that cannot be: prepare it again")
        if not self.share > 0:
            raise RequestError(f"corpus {self.shown} has a share of {self.share}: it must be above 0, or leave the corpus out")

    @property
    def shown(self) -> str:
        return self.path or self.name


class Mixture:
    """Records of all corpora, numbered one corpus after the other."""

    def __init__(self, corpora: Sequence[Corpus], identity: list[Any] | None = None):
        """`identity`, where it is known: to work it out is to read all lengths."""
        names = [corpus.name for corpus in corpora]
        if not names or len(set(names)) < len(names):
            shown = ", ".join(corpus.shown for corpus in corpora)
            raise RequestError(f"a mixture has different corpora, at least one, not {shown or 'none'}")
        self.corpora = tuple(corpora)
        self._identity = identity
        self.starts = np.cumsum([0, *(len(corpus.tokens) for corpus in corpora)])  # of each corpus's numbers
        if self.starts[-1] >= 2**32:
            raise RequestError(f"a mixture of {self.starts[-1]} records: it can have {2**32 - 1}")
        if sum(corpus.share * len(corpus.tokens) for corpus in corpora) < 1:
            raise RequestError("the shares of a mixture are so small that an epoch has less than one record: make them larger")

    def __reduce__(self) -> tuple[Any, ...]:
        return Mixture, (self.corpora, self._identity)

    @cached_property
    def tokens(self) -> np.ndarray:
        """[records] uint32. Only who makes plans asks for them."""
        return np.concatenate([corpus.tokens for corpus in self.corpora], dtype=np.uint32, casting="unsafe")

    @cached_property
    def patches(self) -> np.ndarray:
        """[records] uint32"""
        return np.concatenate([corpus.patches for corpus in self.corpora], dtype=np.uint32, casting="unsafe")

    def locate(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each record, and its number in it."""
        corpus = np.searchsorted(self.starts, records, side="right") - 1
        return corpus, records - self.starts[corpus]

    @property
    def whole(self) -> bool:
        """Whether each window of all pictures is full."""
        return all(corpus.whole or not corpus.patches.any() for corpus in self.corpora)

    def work(self) -> tuple[int, int]:
        """Tokens and patches of an epoch, on average."""
        tokens = sum(int(corpus.share * int(corpus.tokens.sum(dtype=np.int64))) for corpus in self.corpora)
        patches = sum(int(corpus.share * int(corpus.patches.sum(dtype=np.int64))) for corpus in self.corpora)
        return tokens, patches

    def draws(self, seed: int, epoch: int) -> np.ndarray:
        """Numbers [draws] uint32 of an epoch's records, shuffled.

        Each corpus is an endless row of passes, in each of which every record comes once, in an order of its own. An epoch
        takes the next `share` of it, so nothing comes twice before all has come once, from epoch to epoch as well.
        """
        taken = [
            drawn + np.uint32(start)
            for corpus, start in zip(self.corpora, self.starts[:-1].tolist(), strict=True)
            for drawn in _drawn(corpus, seed, epoch)
        ]
        records = np.concatenate([np.zeros(0, np.uint32), *taken])
        del taken
        return records[shuffled(len(records), "records", seed, epoch)]

    @property
    def identity(self) -> list[Any]:
        """What an epoch depends on, the lengths by their digests."""
        if self._identity is None:
            self._identity = [[corpus.name, str(corpus.share), len(corpus.tokens), digest(corpus)] for corpus in self.corpora]
        return self._identity


def _drawn(corpus: Corpus, seed: int, epoch: int) -> list[np.ndarray]:
    """Its records of an epoch, a piece for each pass they come from."""
    count = len(corpus.tokens)
    first, last = (int(corpus.share * count * number) for number in (epoch, epoch + 1))
    pieces = []
    for number in range(first // count, -(-last // count)):
        start, stop = max(first - number * count, 0), min(last - number * count, count)
        whole = stop - start == count  # its order does not matter, as the epoch is shuffled
        order = np.arange(count, dtype=np.uint32) if whole else shuffled(count, "pass", seed, corpus.name, number)
        pieces.append(order[start:stop])
    return pieces


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """A permutation [count] uint32 that depends on the key alone: on no release of NumPy, on no processor.

    Numbers are sorted by hashes that carry the number in their lower bits, which no two share, so any sort gives one result.
    """
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    hashes = np.arange(count, dtype=np.uint64)
    hashes *= np.uint64(STEP)
    hashes += np.uint64(start)
    for shift, factor in SCRAMBLE:
        hashes ^= hashes >> np.uint64(shift)
        hashes *= np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    bits = np.uint64(count.bit_length())
    hashes >>= bits
    hashes <<= bits
    hashes |= np.arange(count, dtype=np.uint64)
    hashes.sort()
    hashes &= np.uint64(2 ** int(bits) - 1)
    return hashes.astype(np.uint32)


def digest(corpus: Corpus) -> str:
    contents = hashlib.sha256()
    for array in (corpus.tokens, corpus.patches):
        contents.update(np.ascontiguousarray(array, "<u4").data)
    return contents.hexdigest()


def read_shares(settings: Mapping[str, float | str], tokens: Mapping[str, int]) -> dict[str, Fraction]:
    """The share of each corpus an epoch, from what a user writes: a weight (`2`) or a share (`50 %`).

    Weights are proportions of tokens among the corpora that have one. These come together as often as they hold tokens: equal
    weights let a small corpus be seen often, and a large one in part.
    """
    for name, count in tokens.items():
        if not count:
            raise RequestError(f"mixture: {name} holds nothing to train on: leave it out")
    shares = {name: _percent(name, value) for name, value in settings.items() if isinstance(value, str)}
    weights = {name: _exact(name, value) for name, value in settings.items() if not isinstance(value, str)}
    together = sum(tokens[name] for name in weights)
    total = sum(weights.values(), Fraction(0))
    shares |= {name: (weight * together / total / tokens[name]).limit_denominator(FINEST) for name, weight in weights.items()}
    for name, share in shares.items():
        if not share:
            raise RequestError(f"mixture: {name} is {settings[name]!r}, less than a millionth of it an epoch: give more, or leave it out")
    return {name: shares[name] for name in settings}


def _percent(name: str, text: str) -> Fraction:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not match:
        raise RequestError(f"mixture: {name} is {text!r}: write a weight such as 2, or a part of it an epoch such as '50 %'")
    return (Fraction(match[1]) / 100).limit_denominator(FINEST)


def _exact(name: str, weight: float) -> Fraction:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise RequestError(f"mixture: {name} has a weight of {weight}: it must be a number above 0")
    return Fraction(str(weight))
