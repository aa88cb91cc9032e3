"""Statistics of one pass against NumPy's of the whole, in any order and any split."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm_jax.data.demos.robots import Dimension
from blm_jax.data.demos.running import Running
from blm_jax.data.demos.statistics import normalise, unnormalise
from blm_jax.errors import RequestError

SHARES = [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1]
DIMENSION = (Dimension("turn", "rad", -3, 3),)
ADVERSARIES = {
    "sorted": lambda rng: np.sort(rng.normal(size=3000)),
    "sorted down": lambda rng: -np.sort(rng.normal(size=3000)),
    "outlier first": lambda rng: np.concatenate([[1e6], rng.normal(size=3000)]),
    "outlier last": lambda rng: np.concatenate([rng.normal(size=3000), [-1e6]]),
    "constant": lambda rng: np.full(500, 0.1),
    "constant far off": lambda rng: np.full(500, 1e9) + rng.normal(size=500),
    "zeros": lambda rng: np.zeros(7),
    "one": lambda rng: np.array([-2.5]),
    "two": lambda rng: np.array([3.0, -1.0]),
    "halves": lambda rng: np.repeat([0.0, 1.0], 500),
    "rare": lambda rng: (np.arange(3000) % 150 == 0).astype(float),
    "growing": lambda rng: 2.0 ** np.arange(-60, 60),
    "both ways": lambda rng: np.cumsum(np.ones(3000)) * np.where(np.arange(3000) % 2, 1, -1),
    "steps of a sensor": lambda rng: np.round(rng.normal(size=3000), 2),
    "tiny": lambda rng: rng.normal(size=3000) * 1e-30,
}


def added(values: np.ndarray, pieces: int = 1) -> Running:
    found = Running(values.shape[1])
    for piece in np.array_split(values, pieces):
        found.add(piece)
    return found


def check(found: Running, values: np.ndarray) -> None:
    """values [n, dims]."""
    assert found.count == len(values)
    np.testing.assert_array_equal([found.low, found.high], [values.min(axis=0), values.max(axis=0)])
    scale = np.abs(values).max(axis=0)
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12 * scale.max())
    reach = np.ptp(values, axis=0)
    assert (np.abs(np.sqrt(found.squares / found.count) - values.std(axis=0)) <= 1e-9 * reach + 1e-12 * scale).all()
    off = np.abs(found.quantiles(SHARES) - np.quantile(values, SHARES, axis=0))
    assert (off <= 1e-3 * reach + 1e-15 * scale).all()


@pytest.mark.parametrize("case", ADVERSARIES)
@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_any_order_of_the_data(case: str, pieces: int) -> None:
    values = ADVERSARIES[case](np.random.default_rng(0))[:, None]
    check(added(values, pieces), values)
    shuffled = np.random.default_rng(1).permutation(values)
    np.testing.assert_array_equal(added(shuffled, 7).quantiles(SHARES), added(values, pieces).quantiles(SHARES))


anything = st.one_of(st.floats(-1e3, 1e3), st.floats(-1e-3, 1e-3), st.floats(-1e30, 1e30), st.sampled_from([0.0, 1.0, -1.0]))
numbers = anything.map(lambda number: float(np.float32(number)))  # as all that is surveyed


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 10), st.randoms(use_true_random=False))
def test_any_values_in_any_split(values: list[float], pieces: int, random) -> None:
    array = np.array(values)[:, None]
    found = added(array, pieces)
    check(found, array)
    parts = [added(part) for part in np.array_split(array, pieces) if len(part)]
    random.shuffle(parts)
    merged = Running(1)
    for part in parts:
        merged.merge(part)
    check(merged, array)
    np.testing.assert_array_equal(merged.bins, found.bins)
    assert (merged.level, merged.first) == (found.level, found.first)


def test_dimensions_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 3)) * [1e-6, 1, 1e6] + [5, 0, -1e3]
    check(added(values, 9), values)


def test_merging_leaves_the_other_alone() -> None:
    one, other = added(np.arange(10.0)[:, None]), added(np.array([[500.0]]))
    before = copy.deepcopy(vars(other))
    one.merge(other)
    one.merge(Running(1))
    for name, value in vars(other).items():
        np.testing.assert_array_equal(value, before[name])
    check(one, np.array([*range(10), 500.0])[:, None])


def test_extremes_know_where_they_were_found() -> None:
    one, other = Running(2), Running(2)
    one.add(np.array([[0.0, 5.0]]), 3)
    one.add(np.array([[1.0, 5.0]]), 4)
    other.add(np.array([[-1.0, 5.0]]), 9)
    one.merge(other)
    assert one.low_at.tolist() == [9, 3] and one.high_at.tolist() == [4, 3]


@pytest.mark.parametrize("scheme", ["quantile", "mean_std", "min_max"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -2.7])
def test_a_constant_is_zero_and_its_constant(scheme, constant: float) -> None:
    summary = added(np.full((300, 1), constant), 13).summary(DIMENSION)
    assert (normalise(np.array([[constant], [7.0]]), summary, scheme) == 0).all()
    assert (unnormalise(np.array([[0.0], [9.0]]), summary, scheme) == constant).all()


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(RequestError, match="no values"):
        Running(1).summary(DIMENSION)
