"""Packing: first-fit by pools in step equals first-fit one by one; how full, how even."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_jax.data.corpora import packing
from blm_jax.data.corpora.budget import Budget, row_budget
from blm_jax.data.corpora.packing import GROUP, POOL, balanced, dealt, first_fit, longest_first, pack, pools_of, propose_row_length
from blm_jax.data.corpora.plan import Plan, make_plan
from blm_jax.data.mixture import Corpus, Mixture, shuffled
from blm_jax.errors import RequestError
from tests.data.corpora.lengths import FILE, TOWER

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

budgets = st.sampled_from([Budget(40, 60), Budget(4096, 12000), Budget(40, 0), Budget(70_000, 30), Budget(30, 2**24 - 1)])


@st.composite
def pools(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Budget]:
    """Lengths [pools, records] that fit a budget: few small ones, many large ones, or the other way round."""
    budget = draw(budgets)
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 80))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0.3, 1, 4]))
    tokens, patches = (random.random(shape) ** skew for _ in range(2))
    return (1 + (budget.tokens - 1) * tokens).astype(np.uint32), (budget.patches * patches).round().astype(np.uint32), budget


def one_by_one(tokens: list[int], patches: list[int], budget: Budget) -> list[int]:
    """First-fit of one pool, as it is told to children."""
    rooms: list[list[int]] = []
    taken = []
    for length, work in zip(tokens, patches, strict=True):
        fits = (i for i, room in enumerate(rooms) if room[0] >= length and room[1] >= work)
        place = next(fits, len(rooms))
        if place == len(rooms):
            rooms.append([budget.tokens, budget.patches])
        rooms[place][0] -= length
        rooms[place][1] -= work
        taken.append(place)
    return taken


@settings(deadline=None, max_examples=60)
@given(pools())
def test_first_fit_is_first_fit(case: tuple[np.ndarray, np.ndarray, Budget]) -> None:
    tokens, patches, budget = case
    bins = first_fit(tokens, patches, budget)
    for pool in range(len(tokens)):
        assert bins[pool].tolist() == one_by_one(tokens[pool].tolist(), patches[pool].tolist(), budget)


@settings(deadline=None, max_examples=60)
@given(pools())
def test_packing_loses_nothing_and_keeps_to_budgets(case: tuple[np.ndarray, np.ndarray, Budget]) -> None:
    tokens, patches, budget = case
    order, counts = pack(tokens, patches, budget)
    assert sorted(order.tolist()) == list(range(tokens.size))
    assert counts.min() >= 1 and counts.sum() == tokens.size
    starts = np.cumsum(counts) - counts
    for lengths, most in ((tokens, budget.tokens), (patches, budget.patches)):
        assert np.add.reduceat(lengths.ravel()[order], starts, dtype=np.int64).max() <= most
    # A sequence is of one pool, and pools come one after the other.
    pool = order // tokens.shape[1]
    assert (np.minimum.reduceat(pool, starts) == np.maximum.reduceat(pool, starts)).all() and (np.diff(pool) >= 0).all()
    # A pool's sequences are those of the pool alone.
    alone, own = pack(tokens[-1:], patches[-1:], budget)
    np.testing.assert_array_equal(order[-len(alone) :], alone + (len(tokens) - 1) * tokens.shape[1])
    np.testing.assert_array_equal(counts[-len(own) :], own)


@settings(deadline=None, max_examples=30)
@given(pools())
def test_the_longest_first(case: tuple[np.ndarray, np.ndarray, Budget]) -> None:
    """Of equal ones, the first that came."""
    tokens = case[0] // 8
    np.testing.assert_array_equal(longest_first(tokens), np.argsort(-tokens.astype(int), axis=1, kind="stable"))


@settings(deadline=None)
@given(st.integers(0, 10**8))
def test_pools_cover_all_records(count: int) -> None:
    place = 0
    for first, number, size in pools_of(count):
        assert first == place and number >= 1 and 1 <= size <= 1.5 * POOL
        place += number * size
    assert place == count


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 7), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_balanced_deals_every_half(power: int, odd: int, seed: int) -> None:
    """In any cut into halves of halves, neighbouring parts differ by the spread of single sequences at most."""
    count = odd * 2**power
    random = np.random.default_rng(seed)
    tokens, patches = random.integers(1, 100, count), random.integers(0, 1000, count)
    order = balanced(tokens, patches)
    assert sorted(order.tolist()) == list(range(count))
    for parts in (2**i for i in range(1, power + 1)):
        sums = patches[order].reshape(parts // 2, 2, -1).sum(axis=2)
        assert (abs(sums[:, 0] - sums[:, 1]) <= np.ptp(patches)).all()


def test_balanced_by_hand() -> None:
    """Sorted 1 to 8: to the first half 1 4 5 8, of which 1 8 go to its first. Equal work goes by tokens."""
    patches = np.array([70, 10, 80, 20, 60, 30, 50, 40])
    assert patches[balanced(np.ones(8, int), patches)].tolist() == [10, 80, 40, 50, 20, 70, 30, 60]
    assert balanced(np.array([9, 7, 8, 6]), np.zeros(4, int)).tolist() == [3, 0, 1, 2]


def test_groups_are_alike_and_in_no_order() -> None:
    """No group is of the lightest of all parts and none of the heaviest, and in a group light and heavy ones stand anywhere."""
    count = 100 * GROUP
    patches = np.random.default_rng(0).integers(0, 1000, count)
    groups = patches[dealt(np.ones(count, int), patches, shuffled(count, 0))].reshape(-1, GROUP)
    assert np.ptp(groups.sum(axis=1)) < 0.01 * groups.sum(axis=1).mean()  # by chance alone it would be 45 %
    assert abs(groups.mean(axis=0) - 500).max() < 5 * 290 / np.sqrt(100)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_dealt_gives_each_group_its_share(count: int, seed: int) -> None:
    patches = np.random.default_rng(seed).integers(0, 1000, count)
    shuffle = shuffled(count, seed)
    order = dealt(np.ones(count, int), patches, shuffle)
    assert sorted(order.tolist()) == list(range(count))
    groups = count // GROUP
    ranks = np.sort(np.sort(patches[order[: groups * GROUP]].reshape(groups, GROUP), axis=1), axis=0)
    # The least of all groups are the least of all, and so on.
    np.testing.assert_array_equal(ranks.T.ravel(), np.sort(patches[order[: groups * GROUP]]))


# --- the committed lengths -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> np.ndarray:
    return np.load(FILE)


@pytest.fixture(scope="module")
def budget(known: np.ndarray) -> Budget:
    mixture = Mixture([Corpus("made-up", known[:, 0], known[:, 1])])
    return Budget(4096, row_budget(propose_row_length(mixture, 4096, TOWER), TOWER))


@pytest.fixture(scope="module", params=[0, 1])
def plan(known: np.ndarray, budget: Budget, request: pytest.FixtureRequest) -> Plan:
    return make_plan(Mixture([Corpus("made-up", known[:, 0], known[:, 1])]), budget, seed=request.param, epoch=request.param)


def test_sequences_are_full(plan: Plan, budget: Budget) -> None:
    fill = plan.tokens.sum() / len(plan) / budget.tokens, plan.patches.sum() / len(plan) / budget.patches
    assert max(fill) >= 0.97 and min(fill) >= 0.90
    assert plan.tokens.max() <= budget.tokens and plan.patches.max() <= budget.patches


@pytest.mark.parametrize("kind", ["short", "no text alone", "double"])
def test_other_mixtures_are_full_with_the_rows_proposed(known: np.ndarray, kind: str) -> None:
    tokens = known[:, 0]
    chosen = {"short": tokens < 1200, "no text alone": known[:, 1] > 0, "double": tokens > 0}[kind]
    mixture = Mixture([Corpus("made-up", tokens[chosen], known[chosen, 1])])
    length = 8192 if kind == "double" else 4096
    budget = Budget(length, row_budget(propose_row_length(mixture, length, TOWER), TOWER))
    test_sequences_are_full(make_plan(mixture, budget, 0, 0), budget)


def test_longest_first_is_fuller_than_order_of_arrival(known: np.ndarray, budget: Budget) -> None:
    tokens, patches = (known[: 4 * POOL, i].reshape(4, POOL) for i in (0, 1))
    arrival = first_fit(tokens, patches, budget).max(axis=1) + 1
    ours = [len(pack(tokens[i : i + 1], patches[i : i + 1], budget)[1]) for i in range(4)]
    assert (ours < arrival).all()


@pytest.mark.parametrize("batch", [64, 256, 1024])
def test_every_cut_of_every_batch_is_balanced(plan: Plan, known: np.ndarray, batch: int) -> None:
    """In tokens, in what vision is charged, and in the patches themselves."""
    patches = np.add.reduceat(known[plan.records, 2], plan.starts[:-1], dtype=np.int64)
    for start in range(0, len(plan) - batch + 1, batch):
        part = slice(start, start + batch)
        order = balanced(plan.tokens[part], plan.patches[part])
        for loads in (plan.tokens[part], plan.patches[part], patches[part]):
            for parts in (2**power for power in range(1, batch.bit_length())):
                sums = loads[order].reshape(parts, -1).sum(axis=1)
                assert sums.max() <= 1.1 * sums.mean()


def test_pools_of_any_number_in_step_give_one_result(known: np.ndarray, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture([Corpus("made-up", known[:20_000, 0], known[:20_000, 1])])
    together = make_plan(mixture, budget, 3, 0)
    monkeypatch.setattr(packing, "TOGETHER", 2)
    np.testing.assert_array_equal(make_plan(mixture, budget, 3, 0).records, together.records)


# --- the benchmark -------------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark() -> Iterator[Any]:
    """Imported as `blm bench` does it, and under its own name: `packing` is a module here too."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("packing")
    sys.path.remove(str(BENCHMARKS))


def test_benchmark(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = benchmark.main(["--records", "2e4"])
    json.dumps(result)
    assert result["records"] == 20_000 and result["sequences"] > 5000
    assert result["fill"]["tokens"] > 0.97 and result["fill"]["patches"] > 0.9
    assert result["tokens_filled_by_pool"]["longest first"] > result["tokens_filled_by_pool"]["in order of arrival"]
    assert list(result["max_over_mean"]) == ["64", "256", "1024"] and list(result["max_over_mean"]["64"]) == [
        "2",
        "4",
        "8",
        "16",
        "32",
        "64",
    ]
    assert 0 < result["peak_bytes"] < 1e9
    assert "20,000 records" in capsys.readouterr().out
    with pytest.raises(RequestError, match="at least 1000"):
        benchmark.main(["--records", "10"])
