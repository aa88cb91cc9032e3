"""AdamW is PyTorch's; narrow moments lead to the same place; rates and schedules are what a config says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from blm_jax.recipe import Moments, OptimizerConfig
from blm_jax.train.optimizer import count_bytes, make_optimizer, schedule

CONFIG = OptimizerConfig(rate=1e-2, schedule="constant", warmup=0.0, betas=(0.9, 0.99), weight_decay=0.1, clip=1e9)
NAMES = ("layer.kernel", "layer.bias", "other.kernel")


def params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"layer": {"kernel": (6, 5), "bias": (5,)}, "other": {"kernel": (4, 3)}}
    return jax.tree.map(lambda shape: rng.standard_normal(shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(config: OptimizerConfig, steps: int, rate_of: dict[str, float] | None = None) -> dict[str, Any]:
    optimizer = make_optimizer(config, steps, rate_of or dict.fromkeys(NAMES, 1.0))
    tree: Any = jax.tree.map(jnp.asarray, params())
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(params(step + 1), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def test_as_pytorch() -> None:
    """Decay of matrices alone, one group at half the rate."""
    theirs = jax.tree.map(lambda leaf: torch.nn.Parameter(torch.tensor(leaf)), params())
    layer, other = theirs["layer"], theirs["other"]
    groups = [
        {"params": [layer["kernel"]], "weight_decay": 0.1},
        {"params": [layer["bias"]], "weight_decay": 0.0},
        {"params": [other["kernel"]], "weight_decay": 0.1, "lr": 5e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for step in range(10):
        for parameter, slope in zip(jax.tree.leaves(theirs), jax.tree.leaves(params(step + 1)), strict=True):
            parameter.grad = torch.tensor(slope)
        optimizer.step()
    ours = run(CONFIG, 10, {"layer.kernel": 1.0, "layer.bias": 1.0, "other.kernel": 0.5})
    for one, parameter in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, parameter.detach(), atol=1e-5)


@pytest.mark.parametrize(("form", "bound", "share"), [("bfloat16", 0.02, 0.5), ("int8", 0.1, 0.3)])
def test_narrow_moments_lead_to_the_same_place(form: Moments, bound: float, share: float) -> None:
    """To the bottom of a bowl, 300 steps with b2 = 0.999, of which bfloat16 without chance would lose every one."""
    rng = np.random.default_rng(0)
    goal = rng.standard_normal((8, 64)).astype(np.float32)

    def descend(form: Moments) -> tuple[np.ndarray, int]:
        config = OptimizerConfig(rate=2e-2, schedule="constant", warmup=0.0, betas=(0.9, 0.999), weight_decay=0.0, moments=form)
        optimizer = make_optimizer(config, 300, {"kernel": 1.0})
        tree: Any = {"kernel": jnp.zeros((8, 64))}
        state = optimizer.init(tree)
        size = count_bytes(state)

        @jax.jit
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            tree, state = carry
            slope = (tree["kernel"] - goal) * (1 + 0.3 * jax.random.normal(key, goal.shape))
            updates, state = optimizer.update({"kernel": slope}, state, tree)
            return (optax.apply_updates(tree, updates), state), None

        (tree, _), _ = jax.lax.scan(step, (tree, state), jax.random.split(jax.random.key(0), 300))
        return np.asarray(tree["kernel"]), size

    found, size = descend(form)
    exact, whole = descend("float32")
    assert np.abs(exact - goal).max() < 0.02 and np.abs(found - goal).mean() < bound
    assert size <= share * whole + 100 + (8 * 8 if form == "int8" else 0)


def rate(config: OptimizerConfig, steps: int, step: int) -> float:
    return float(np.asarray(schedule(config, steps)(step)))


def test_schedules() -> None:
    config = OptimizerConfig(rate=2.0, warmup=0.1, floor=0.25)
    rates = [rate(config, 100, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0.5)
    constant = OptimizerConfig(rate=2.0, warmup=0.0, schedule="constant")
    assert {rate(constant, 10, step) for step in range(10)} == {2.0}
    linear = OptimizerConfig(rate=2.0, warmup=0.0, schedule="linear")
    assert rate(linear, 10, 5) == pytest.approx(1.0)


def test_what_is_not_allowed_does_not_move() -> None:
    allowed = {"layer": {"kernel": np.arange(6)[:, None] == 2, "bias": np.ones(5, bool)}, "other": {"kernel": np.zeros((1, 1), bool)}}
    optimizer = make_optimizer(CONFIG, 5, dict.fromkeys(NAMES, 1.0), allowed)
    tree = jax.tree.map(jnp.asarray, params())
    updates, _ = optimizer.update(jax.tree.map(jnp.asarray, params(1)), optimizer.init(tree), tree)
    assert not updates["other"]["kernel"].any() and updates["layer"]["bias"].all()  # pyright: ignore
    assert np.flatnonzero(np.asarray(updates["layer"]["kernel"]).any(axis=1)).tolist() == [2]  # pyright: ignore


def test_what_is_not_allowed_has_no_say_in_clipping() -> None:
    """However large its slopes are in one step, the rest moves as if there were none."""
    allowed = {"layer": {"kernel": np.ones((1, 1), bool), "bias": np.ones(5, bool)}, "other": {"kernel": np.zeros((1, 1), bool)}}
    optimizer = make_optimizer(replace(CONFIG, clip=1.0), 5, dict.fromkeys(NAMES, 1.0), allowed)
    tree, moved = jax.tree.map(jnp.asarray, params()), []
    for size in (0.0, 1000.0):
        state, updates = optimizer.init(tree), tree
        for seed, own in ((1, 0.0), (2, size)):
            slopes: Any = jax.tree.map(jnp.asarray, params(seed))
            slopes["other"]["kernel"] = slopes["other"]["kernel"] * own
            updates, state = optimizer.update(slopes, state, tree)
        moved.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *moved)
