"""Which window of a mixture of demonstrations comes when: a function of the seed and a number, and of nothing that was read before."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from blm_jax.data.mixture import Corpus, Mixture
from blm_jax.errors import RequestError


def windows(name: str, count: int, share: Fraction = Fraction(1), path: str = "") -> Corpus:
    """So many windows as a part of a mixture, in which each counts as one. They take no memory."""
    one, none = (np.broadcast_to(np.uint8(value), count) for value in (1, 0))
    return Corpus(name, one, none, share, path=path)


class WindowOrder:
    """Epochs one behind the other, each shuffled and drawn by the shares of the mixture. It pickles to a few numbers."""

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture, self.seed = mixture, seed
        self._epoch = lru_cache(maxsize=2)(lambda epoch: mixture.draws(seed, epoch))
        self._start = lru_cache(maxsize=4)(self._first)  # exact fractions are slow, and asked for with each window
        self._length = float(sum(corpus.share * len(corpus.tokens) for corpus in mixture.corpora))

    def __reduce__(self) -> tuple[Any, ...]:
        return _order, ([(corpus.name, len(corpus.tokens), corpus.share, corpus.path) for corpus in self.mixture.corpora], self.seed)

    def _first(self, epoch: int) -> int:
        """The number of the epoch's first window. Where a share is no whole number of windows, epochs differ in length by one."""
        return sum(int(corpus.share * len(corpus.tokens) * epoch) for corpus in self.mixture.corpora)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The corpus of the `number`-th window of the run, and the window in it."""
        if number < 0:
            raise RequestError(f"windows are counted from 0: there is no window {number}")
        epoch = int(number / self._length)
        while self._start(epoch) > number:
            epoch -= 1
        while self._start(epoch + 1) <= number:
            epoch += 1
        record = self._epoch(epoch)[number - self._start(epoch)]
        corpus, window = self.mixture.locate(np.asarray(record, np.int64))
        return int(corpus), int(window)


def _order(parts: Sequence[tuple[str, int, Fraction, str]], seed: int) -> WindowOrder:
    return WindowOrder(Mixture([windows(*part) for part in parts]), seed)
