"""What experts do in every cell, beside hands that act at random or not at all: one program for all of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.evaluate.world import experts, physics, tasks
from blm_jax.evaluate.world.arms import ROBOTS, TABLE
from blm_jax.evaluate.world.scene import HZ
from blm_jax.evaluate.world.tasks import TASKS

STEPS, HELD = 90, 10  # of an episode; at its end success must hold for so long
EXPERT, NOISY, RANDOM, IDLE = range(4)
EPISODES = {EXPERT: 5, NOISY: 2, RANDOM: 2, IDLE: 2}  # of a cell
NOISE = 0.005


@jax.jit
@jax.vmap
def play(key: jax.Array, robot: jax.Array, task: jax.Array, who: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Success [STEPS], joints and actions [STEPS, ...] of one episode."""
    place_key, key = jax.random.split(key)
    setting, state = tasks.reset(place_key, robot, task)
    arm = setting.arm

    def step(carry: Any, key: jax.Array):
        state, memory, off = carry
        wish, memory = experts.act(setting, state, memory)
        any_key, off_key = jax.random.split(key)
        aside = jax.random.uniform(any_key, wish.shape, minval=-1, maxval=1)
        off = jnp.where(who == NOISY, experts.drifted(memory, off, off_key, NOISE), 0.0)
        anyhow = jnp.append(state.joints + aside[:-1] * arm.speed / HZ, jnp.abs(aside[-1]))
        action = jnp.select([who == RANDOM, who == IDLE], [anyhow, jnp.append(state.joints, 1.0)], wish.at[:-1].add(off))
        after = physics.step(setting, state, action)
        return (after, memory, off), (tasks.succeeded(setting, after), state.joints, wish)

    carry = (state, experts.begin(setting, state), jnp.zeros_like(state.joints))
    return jax.lax.scan(step, carry, jax.random.split(key, STEPS))[1]


@pytest.fixture(scope="module")
def episodes() -> dict[int, tuple[np.ndarray, ...]]:
    """By who acted: success [robots, tasks, episodes, STEPS], joints and wishes likewise."""
    rows = np.array(
        [
            (robot, task, who)
            for who, count in EPISODES.items()
            for robot in range(len(ROBOTS))
            for task in range(len(TASKS))
            for _ in range(count)
        ]
    )
    results = play(jax.random.split(jax.random.key(0), len(rows)), *rows.T)
    cells = (len(ROBOTS), len(TASKS))
    return {
        who: tuple(np.asarray(x)[rows[:, 2] == who].reshape(*cells, count, *x.shape[1:]) for x in results)
        for who, count in EPISODES.items()
    }


def _succeeded(success: np.ndarray) -> np.ndarray:
    """The part of each cell's episodes [robots, tasks] that end in lasting success."""
    return np.mean(np.all(success[..., -HELD:], axis=-1), axis=-1)


def test_experts_succeed_in_every_cell(episodes: dict) -> None:
    cells = _succeeded(episodes[EXPERT][0])
    assert np.mean(cells) >= 0.95, cells
    assert np.min(cells) >= 0.8, cells


def test_experts_recover_from_what_jolts_them(episodes: dict) -> None:
    assert np.mean(_succeeded(episodes[NOISY][0])) >= 0.9


def test_hands_that_act_at_random_or_not_at_all_fail(episodes: dict) -> None:
    assert np.mean(_succeeded(episodes[RANDOM][0])) <= 0.05
    assert np.mean(_succeeded(episodes[IDLE][0])) <= 0.02


def test_what_is_wished_can_be_done(episodes: dict) -> None:
    """Within limits, and slower than joints can turn."""
    _, joints, wishes = episodes[EXPERT]
    limits = [TABLE[name][:, None, None, None] for name in ("lower", "upper", "speed")]  # [robots, 1, 1, 1, JOINTS]
    assert np.all((wishes[..., :-1] >= limits[0] - 1e-6) & (wishes[..., :-1] <= limits[1] + 1e-6))
    assert np.all(np.abs(wishes[..., :-1] - joints) <= experts.PART * limits[2] / HZ + 1e-5)
    grips = wishes[..., -1]
    assert set(np.unique(grips[:, ~experts.SLIDES])) == {0, 1}
    # Pads that slide a cube are apart, and nearer to each other than it is broad.
    apart = grips[:, experts.SLIDES] * TABLE["stroke"][:, None, None, None]
    np.testing.assert_allclose(apart, np.broadcast_to(experts.SPREAD[experts.SLIDES][:, None, None], apart.shape), rtol=1e-6)
    assert np.all((apart > 0) & (apart < 0.03))
