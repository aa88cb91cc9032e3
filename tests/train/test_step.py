"""The same losses on any mesh and with any accumulation; what is frozen stays; what is not finite is skipped."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.models.mllm import abstract_params
from blm_jax.train.stages import StageOne
from blm_jax.weights.names import leaves
from tests.train.runs import COMPUTE, CONFIG, conversations, losses, make_mesh, random_tree, start

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


def test_no_slopes_are_found_below_blocks_that_stay() -> None:
    """Nor is time spent on them; above they are the same."""
    params, batch = random_tree(abstract_params(CONFIG, jnp.float32)), conversations(0)

    def compiled(kept: int) -> Any:
        stage = StageOne(CONFIG, COMPUTE, corpora=2, kept=kept)
        key = jax.random.key(0)
        slopes = jax.grad(lambda params: stage.loss(params, {}, None, batch, key, stage.weigh(batch, key))[0])
        return jax.jit(slopes).lower(params).compile()

    whole, above = compiled(0), compiled(1)
    slopes = dict(leaves(whole(params)))
    for path, slope in leaves(above(params)):
        if path[:2] == ("decoder", "blocks"):
            assert not np.any(slope[0]) and np.any(slope[1:])
            np.testing.assert_allclose(slope[1:], slopes[path][1:], rtol=1e-4, atol=1e-6)
        elif path[:2] == ("decoder", "norm"):
            np.testing.assert_allclose(slope, slopes[path], rtol=1e-4, atol=1e-6)
        elif path[0] == "vision":
            assert not np.any(slope) and np.any(slopes[path])
    assert above.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]
