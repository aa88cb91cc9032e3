"""The same losses on any mesh and with any accumulation; what is frozen stays; what is not finite is skipped."""

from __future__ import annotations

from functools import cache

import pytest

from tests.train.runs import losses, make_mesh, start

MESHES = [
    pytest.param((2, 2, 2), 1, id="2x2x2"),
    pytest.param((1, 2, 1), 2, id="two, in two parts"),
    pytest.param((1, 8, 1), 1, id="fsdp 8", marks=pytest.mark.long),
    pytest.param((4, 2, 1), 1, id="4x2", marks=pytest.mark.long),
]
STEPS = 20


@cache
def expected(which: int) -> list[dict[str, float]]:
    return [losses(report.told) for report in start(which, make_mesh(1, 1, 1)).go(STEPS)]


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(("shape", "parts"), MESHES)
def test_the_same_losses_on_any_mesh(which: int, shape: tuple[int, int, int], parts: int) -> None:
    found = [losses(report.told) for report in start(which, make_mesh(*shape), parts=parts).go(STEPS)]
    for number, bound in ((0, 1e-5), (STEPS - 1, 1e-3)):
        for name, value in expected(which)[number].items():
            assert found[number][name] == pytest.approx(value, rel=bound), (number, name)
    first, last = (sum(row.values()) for row in (found[0], found[-1]))
    assert last < 0.9 * first  # they learn
