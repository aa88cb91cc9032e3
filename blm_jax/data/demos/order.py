"""Which window of a mixture of demonstrations comes when: a function of the seed and a number, and of nothing that was read before."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from blm_jax.data.mixture import Mixture
from blm_jax.errors import RequestError


class WindowOrder:
    """Epochs one behind the other, each shuffled and drawn by the shares of the mixture."""

    def __init__(self, mixture: Mixture, seed: int):
        self.mixture, self.seed = mixture, seed
        self._epoch = lru_cache(maxsize=2)(lambda epoch: mixture.draws(seed, epoch))

    def __reduce__(self) -> tuple[type[WindowOrder], tuple[Mixture, int]]:
        return WindowOrder, (self.mixture, self.seed)

    def _start(self, epoch: int) -> int:
        """The number of the epoch's first window. Where a share is no whole number of windows, epochs differ in length by one."""
        return sum(int(corpus.share * len(corpus.tokens) * epoch) for corpus in self.mixture.corpora)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The corpus of the `number`-th window of the run, and the window in it."""
        if number < 0:
            raise RequestError(f"windows are counted from 0: there is no window {number}")
        epoch = int(number / float(sum(corpus.share * len(corpus.tokens) for corpus in self.mixture.corpora)))
        while self._start(epoch) > number:
            epoch -= 1
        while self._start(epoch + 1) <= number:
            epoch += 1
        record = self._epoch(epoch)[number - self._start(epoch)]
        corpus, window = self.mixture.locate(np.asarray(record, np.int64))
        return int(corpus), int(window)
