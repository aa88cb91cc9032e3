"""Vision work: a sum that bounds what a row of windows needs, and budgets that follow from it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_jax.data.corpora.budget import Budget, all_whole, least_row, margin, row_budget, vision_work
from blm_jax.data.corpora.packing import propose_row_length
from blm_jax.data.corpora.plan import make_plan
from blm_jax.data.mixture import Corpus, Mixture
from blm_jax.data.vision.windows import cut_frame, lay_out_groups, pack, slots_needed, window_side
from blm_jax.errors import RequestError
from tests.data.corpora.lengths import FILE, RECORDS, TOWER, records, rows

SMALL_WINDOWS = replace(TOWER, window=56)  # 2x2 visual tokens
ODD_WINDOWS = replace(TOWER, patch=4, merge=3, window=60)  # 5x5

sides = st.integers(1, 9).map(lambda cells: 2 * cells)
record_frames = st.lists(st.tuples(sides, sides), max_size=5)


@settings(deadline=None, max_examples=150)
@given(st.lists(record_frames, min_size=1, max_size=8), st.sampled_from([TOWER, SMALL_WINDOWS]))
def test_a_row_holds_its_records(frames: list[list[tuple[int, int]]], tower) -> None:
    """A row of the least length whose budget the records keep to is never too short."""
    work = sum(vision_work(record, tower) for record in frames)
    slots = -(-max(work + row_excess(tower), 1) // tower.window_patches)
    row_length = max(slots, 4) * tower.window_patches
    assert row_budget(row_length, tower) >= work
    layout = lay_out_groups([[frame for record in frames for frame in record]], tower, row_length=row_length)
    assert layout.row_length == row_length


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), min_size=1, max_size=6))
def test_whole_windows_need_no_margin(windows: list[list[tuple[int, int]]]) -> None:
    """Pictures of so many windows each way: a row is as long as they are."""
    side = window_side(TOWER) * TOWER.merge
    frames = [[(side * rows, side * columns) for rows, columns in record] for record in windows]
    work = sum(vision_work(record, TOWER) for record in frames)
    assert all(all_whole(record, TOWER) for record in frames) and work == least_row(work, TOWER, True) == row_budget(work, TOWER, True)
    layout = lay_out_groups([[frame for record in frames for frame in record]], TOWER, row_length=work)
    assert layout.row_length == work
    assert not all_whole([(side, side), (side, side - TOWER.merge)], TOWER)


def row_excess(tower) -> int:
    return 10 * tower.window_patches - row_budget(10 * tower.window_patches, tower)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from([2, 3, 4, 5, 8]), st.data())
def test_the_margin_bounds_any_windows(side: int, data: st.DataObject) -> None:
    """More cases than pictures can make: partial windows in any numbers."""
    tower = replace(TOWER, window=28 * side)
    capacity = side**2
    sizes = sorted({height * width for height in range(1, side + 1) for width in range(1, side + 1)} - {capacity})
    counts = data.draw(st.lists(st.integers(0, 20), min_size=len(sizes), max_size=len(sizes)))
    windows = np.repeat(sizes, counts)
    charged = sum((Fraction(1, capacity // int(size)) for size in windows), Fraction(0))
    assert pack(windows, capacity)[1] <= charged + margin(tower)


@settings(deadline=None, max_examples=50)
@given(record_frames, record_frames)
def test_work_is_at_least_the_patches_and_adds_up(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> None:
    works = vision_work(one, TOWER), vision_work(two, TOWER)
    assert works[0] >= sum(height * width for height, width in one)
    assert sum(works) - 1 <= vision_work(one + two, TOWER) <= sum(works)
    assert vision_work([], TOWER) == 0


def test_work_by_hand() -> None:
    """8x8 patches are a window; 8x14 a window and one of 4x3 visual tokens, of which no two share a slot; 4x4 a quarter of one."""
    assert vision_work([(8, 8)], TOWER) == 64
    assert vision_work([(8, 14)], TOWER) == 128
    assert vision_work([(4, 4)], TOWER) == 16
    assert vision_work([(6, 6)], TOWER) == 64
    assert vision_work([(2, 6)], TOWER) == 13  # three visual tokens: five share a slot


def test_lengths_are_what_their_generator_says() -> None:
    known = np.load(FILE)
    assert known.shape == (RECORDS, 3) and FILE.stat().st_size < 400_000
    np.testing.assert_array_equal(known[:500], rows(500))


def test_proposed_rows_are_filled_and_hold_real_pictures() -> None:
    """The lengths' own frames, packed, and laid out as they will be for training."""
    count = 4096
    frames = [sizes for _, sizes in islice(records(), count)]
    known = np.load(FILE)[:count]
    mixture = Mixture([Corpus("made-up", known[:, 0], known[:, 1])])
    row_length = propose_row_length(mixture, 4096, TOWER)
    assert row_length % TOWER.window_patches == 0
    plan = make_plan(mixture, Budget(4096, row_budget(row_length, TOWER)), 0, 0)
    needed = [
        64 * slots_needed([cut_frame(*frame, TOWER) for record in plan.sequence(i) for frame in frames[record]], TOWER)
        for i in range(len(plan))
    ]
    assert max(needed) <= row_length
    assert sum(needed) >= 0.9 * row_length * len(plan)


def test_proposals() -> None:
    tokens, none = np.full(10, 100), np.zeros(10, int)
    assert propose_row_length(Mixture([Corpus("text", tokens, none)]), 1000, TOWER) == 0
    even = propose_row_length(Mixture([Corpus("even", tokens, np.full(10, 300))]), 1000, TOWER)
    assert even == least_row(3000, TOWER)
    # A share counts as often as it is drawn, and the largest record always fits.
    halves = [Corpus("text", tokens, none, Fraction(3)), Corpus("pictures", tokens, np.full(10, 400))]
    assert least_row(1000, TOWER) <= propose_row_length(Mixture(halves), 1000, TOWER) <= least_row(1200, TOWER)
    film = propose_row_length(Mixture([*halves, Corpus("film", tokens[:1], np.array([4000]))]), 1000, TOWER)
    assert film == least_row(4000, TOWER)
    # No epoch of its own has a record of both.
    rare = [Corpus(name, tokens[:1], none[:1] + 300, Fraction(1, 2)) for name in "ab"]
    assert propose_row_length(Mixture(rare), 1000, TOWER) >= least_row(3000, TOWER)
    with pytest.raises(RequestError, match="record 0 of corpus text has 100 tokens, a sequence holds 99"):
        propose_row_length(Mixture(halves), 99, TOWER)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 50_000))
def test_the_least_row(work: int) -> None:
    row = least_row(work, TOWER)
    assert work <= row_budget(row, TOWER)
    if row > 3 * 64:
        assert row_budget(row - 64, TOWER) < work


def test_wrong_budgets() -> None:
    with pytest.raises(RequestError, match="a sequence of 0 tokens"):
        Budget(0)
    for length in (100, 0, 64, -64):
        with pytest.raises(RequestError, match=f"a vision row of {length} patches: it must be a multiple of 64, from 192 on"):
            row_budget(length, TOWER)
    assert row_budget(192, TOWER) == 100
