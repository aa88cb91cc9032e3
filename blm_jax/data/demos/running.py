"""Statistics of more values than memory holds: read once, in any order, in as many parts as there are processes.

Quantiles are read from histograms whose bins are a power of two wide and lie on a grid that begins at 0. A wider bin is two
narrower ones, so a histogram that must reach further halves its bins without an error, and what the bins are in the end depends on
the smallest and the largest value alone: no order of the data, and no split of it, changes a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blm_jax.data.demos.robots import Dimension
from blm_jax.data.demos.statistics import Summary
from blm_jax.errors import RequestError

BINS = 2**14  # the range of the values takes more than half of them, so a quantile is wrong by 1/8192 of the range at most
DIGITS = 50  # bits of a bin's number: values whose differences are lost beside their size share a bin
TINY = 1e-100  # what is smaller is 0: it would be lost in the widest bins, and must not lie elsewhere in narrow ones


class Running:
    """Of each dimension, [dims]. Values are those that a float32 can hold."""

    def __init__(self, dims: int):
        self.count = 0
        self.mean, self.squares = np.zeros(dims), np.zeros(dims)  # the sum of squared distances from the mean
        self.low, self.high = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.low_at, self.high_at = np.zeros(dims, np.int64), np.zeros(dims, np.int64)  # what they were found in
        self.level = np.zeros(dims, np.int64)  # bins are 2 ** level wide
        self.first = np.zeros(dims, np.int64)  # the place of bin 0 on the grid
        self.bins = np.zeros((dims, BINS), np.int64)

    def add(self, values: np.ndarray, label: int = 0) -> None:
        """Finite values [n, dims], and the number of what they were found in."""
        if not len(values):
            return
        values = np.ascontiguousarray(values.T, np.float64)  # [dims, n]
        self._reach(values.min(axis=1), values.max(axis=1), label, label)
        for i, row in enumerate(values):
            self.bins[i] += np.bincount(_places(row, self.level[i]) - self.first[i], minlength=BINS)
        mean = values.mean(axis=1)
        self._join(values.shape[1], mean, np.square(values - mean[:, None]).sum(axis=1))

    def merge(self, other: Running) -> None:
        """As if what the other was given had been given to this one."""
        if not other.count:
            return
        self._reach(other.low, other.high, other.low_at, other.high_at)
        for i in range(len(self.mean)):
            self.bins[i] += _laid(other.bins[i], other.first[i], self.level[i] - other.level[i], self.first[i])
        self._join(other.count, other.mean, other.squares)

    def _reach(self, low: np.ndarray, high: np.ndarray, low_at: Any, high_at: Any) -> None:
        """Widen the bins until they hold values from low to high too."""
        self.low_at = np.where(low < self.low, low_at, self.low_at)
        self.high_at = np.where(high > self.high, high_at, self.high_at)
        low, high = np.minimum(self.low, low), np.maximum(self.high, high)
        for i in np.flatnonzero((low < self.low) | (high > self.high)):
            level = _level(low[i], high[i])
            first = _places(low[i], level)
            if self.count:
                self.bins[i] = _laid(self.bins[i], self.first[i], level - self.level[i], first)
            self.level[i], self.first[i] = level, first
        self.low, self.high = low, high

    def _join(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total = self.count + count
        apart = mean - self.mean
        self.squares += squares + np.square(apart) * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    def quantiles(self, shares: Sequence[float]) -> np.ndarray:
        """[shares, dims], where NumPy would have them but for the width of a bin."""
        found = np.empty((len(shares), len(self.mean)))
        for i, bins in enumerate(self.bins):
            below = np.cumsum(bins)
            for j, share in enumerate(shares):
                place = share * (self.count - 1)
                ranks = np.array([np.floor(place), np.ceil(place)])
                middles = np.searchsorted(below, ranks, side="right") + self.first[i] + 0.5
                one, other = np.clip(np.ldexp(middles, self.level[i]), self.low[i], self.high[i])
                found[j, i] = one + (place - ranks[0]) * (other - one)
        return found

    def summary(self, dimensions: Sequence[Dimension]) -> Summary:
        if not self.count:
            raise RequestError("there are no values to make statistics of")
        q01, q99 = self.quantiles([0.01, 0.99])
        numbers: dict[str, Any] = {
            "mean": self.mean,
            "std": np.sqrt(self.squares / self.count),
            "min": self.low,
            "max": self.high,
            "q01": q01,
            "q99": q99,
        }
        names = tuple(dimension.name for dimension in dimensions)
        return Summary(names, (self.count,) * len(names), **{name: tuple(found.tolist()) for name, found in numbers.items()})


def _places(values: Any, level: int) -> Any:
    """On the grid of bins 2 ** level wide."""
    return np.floor(np.ldexp(np.where(np.abs(values) < TINY, 0, values), -int(level))).astype(np.int64)


def _level(low: float, high: float) -> int:
    """The narrowest bins of which BINS reach from low to high."""
    largest = max(abs(low), abs(high))
    level = max(int(np.frexp(largest)[1]) - DIGITS, -1000)
    while _places(high, level) - _places(low, level) >= BINS:
        level += 1
    return level


def _laid(bins: np.ndarray, first: int, wider: int, new_first: int) -> np.ndarray:
    """The counts [BINS] in bins that are 2 ** wider as wide, from `new_first` on."""
    taken = np.flatnonzero(bins)
    laid = np.zeros_like(bins)
    np.add.at(laid, ((taken + first) >> min(int(wider), 63)) - new_first, bins[taken])
    return laid
