"""Real-time chunking: chunks made while the robot moves go on from what it has begun."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.batch import Chunks, IntentRows, RobotRows
from blm_jax.models.objective import Committed, sample, soft_mask
from blm_jax.models.policy import Policy
from tests.models.policies import OPTIMISED, Inputs, make_inputs, make_noise, make_policy, small, toy, train

Way = Literal["guided", "prefix", "naive"]


@pytest.mark.parametrize("guided", [True, False])
def test_decided_steps_are_kept(guided: bool) -> None:
    """For every delay, with one program; without any, and nothing left of the last chunk, it is plain sampling."""
    config = small(objective=dict(prefix=3))
    policy, inputs, noise = make_policy(config), make_inputs(config), make_noise(config, 8)
    mask = np.repeat(inputs.robots.action_mask, 2, axis=0)
    last = np.where(mask, make_noise(config, 8, seed=1), np.nan)
    traces = []

    @jax.jit
    def run(policy: Policy, inputs: Inputs, noise: jax.Array, committed: Committed) -> jax.Array:
        traces.append(0)
        return sample(policy, policy.condition(inputs.intent, inputs.robots), noise, 3, committed, guided=guided)

    def chunks(delay: int, overlap: int) -> jax.Array:
        return run(policy, inputs, noise, Committed(jnp.asarray(last), jnp.int32(delay), jnp.int32(overlap)))

    plain = jax.jit(lambda: sample(policy, policy.condition(inputs.intent, inputs.robots), noise, 3))()
    np.testing.assert_allclose(chunks(0, 0), plain, atol=1e-5)
    for delay in range(1, 4):
        found = chunks(delay, 5)
        np.testing.assert_array_equal(found[:, :delay], np.where(mask, last, 0)[:, :delay])
        assert np.isfinite(found).all() and np.abs(found - plain)[:, delay:].max() > 0.01
    assert len(traces) == 1


def test_wishes_fade() -> None:
    for delay, overlap in ((0, 8), (3, 8), (3, 3), (0, 0)):
        weights = soft_mask(Committed(jnp.zeros(()), jnp.int32(delay), jnp.int32(overlap)), 10)
        # (overlap - i) / (overlap - delay + 1), bent by x (e^x - 1) / (e - 1): equation 5 of Black et al. 2025.
        place = (overlap - np.arange(delay, overlap)) / (overlap - delay + 1)
        expected = [1.0] * delay + list(place * (np.exp(place) - 1) / (np.e - 1)) + [0.0] * (10 - overlap)
        np.testing.assert_allclose(weights, expected, atol=1e-6)


# A course from x = -0.6 to 1, past a disc in the middle, on either side. The robot goes forward by itself, one STEP after the
# other, and a chunk says how far to the side. Which side is open until x = -0.1: a chunk begun before that chooses, and the next one
# may choose otherwise.

HORIZON, EXECUTED = 14, 6  # a chunk's steps, and after how many of them the next chunk is begun
STEP, WIDTH, START = 0.08, 0.6, -0.6
DISC = 0.28  # radius, around x = 0.5 and side 0
FASTEST = 0.16  # sideways, in a step; the course's fastest is 0.13
DEADLINE = 32  # steps; who never pauses needs 20
DELAYS = np.arange(7)
FLOW_STEPS = 8
TRIALS = 48  # of each delay
ROWS, STEPS, RATE = 128, 900, 2.5e-3  # of training


def draw_courses(key: jax.Array, rows: int = ROWS) -> Inputs:
    """A robot near either course, and how it goes on: back to the course, if it was off."""
    for_x, for_side, for_error = jax.random.split(key, 3)
    x = jax.random.uniform(for_x, (rows, 1), minval=START, maxval=1.0)
    side = jnp.where(jax.random.bernoulli(for_side, 0.5, (rows, 1)), WIDTH, -WIDTH)
    error = 0.04 * jax.random.normal(for_error, (rows, 1))
    ahead = jnp.arange(1, HORIZON + 1)
    chunk = side * swing(x + STEP * ahead) + error * jnp.exp(-ahead / 2)
    intent, robots = observe(x[:, 0], (side * swing(x) + error)[:, 0])
    return Inputs(intent, robots, Chunks(chunk[..., None] / WIDTH, jnp.ones((rows, HORIZON, 1), bool)), intent, jnp.zeros(rows, bool))


def swing(x: jax.Array) -> jax.Array:
    return jnp.sin(jnp.pi * jnp.clip((x + 0.1) / 1.2, 0, 1)) ** 2


def observe(x: jax.Array, side: jax.Array) -> tuple[IntentRows, RobotRows]:
    """x and side [rows]; the intent has nothing to say."""
    rows = x.shape[0]
    intent = IntentRows(jnp.ones((rows, 1, 4)), jnp.ones((rows, 1), bool), jnp.zeros((rows, 1, 4), jnp.int32))
    state = jnp.stack([(x - 0.2) / 0.5, side / WIDTH], axis=1)
    return intent, RobotRows(jnp.zeros(rows, jnp.int32), state, jnp.ones((rows, 2), bool), jnp.ones((rows, HORIZON, 1), bool))


Planner = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]  # x, side, what is left of the last plan -> sides to be at


@partial(jax.jit, static_argnames="way", compiler_options=OPTIMISED)
def make_plans(policy: Policy, x: jax.Array, side: jax.Array, left: jax.Array, overlap: jax.Array, key: jax.Array, way: Way) -> jax.Array:
    def one(x: jax.Array, side: jax.Array, left: jax.Array, delay: jax.Array, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, left.shape)
        committed = None if way == "naive" else Committed(left, jnp.minimum(delay, overlap), overlap)
        return sample(policy, policy.condition(*observe(x, side)), noise, FLOW_STEPS, committed, guided=way == "guided")

    return jax.vmap(one)(x, side, left, jnp.asarray(DELAYS), jax.random.split(key, len(DELAYS)))


def planner(policy: Policy, way: Way, seed: int) -> Planner:
    """Plans for all DELAYS at once: x and side [delays, rows], plans [delays, rows, HORIZON]."""
    keys = iter(jax.random.split(jax.random.key(seed), 10))

    def plan(x: np.ndarray, side: np.ndarray, last: np.ndarray | None) -> np.ndarray:
        left = np.zeros((*side.shape, HORIZON, 1)) if last is None else last[..., None] / WIDTH
        overlap = jnp.int32(0 if last is None else HORIZON - EXECUTED)
        return np.asarray(make_plans(policy, x, side, left, overlap, next(keys), way))[..., 0] * WIDTH

    return plan


def drive(plan: Planner, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Never pausing: a plan is begun every EXECUTED steps and used once its delay is over.

    -> successes [delays, rows], and the farthest that a new plan ever was, as it took over, from the last one [delays, rows].
    """
    side, safe, jumps = start(rows), np.ones((len(DELAYS), rows), bool), np.zeros((len(DELAYS), rows))
    each = np.arange(len(DELAYS))
    current = upcoming = plan(np.full(side.shape, START), side, None)
    begun, next_begun = np.zeros(len(DELAYS), int), 0  # the step at which each plan was begun
    for step in range(round((1 - START) / STEP)):
        for now in (False, True):  # a plan that is ready just when the next is begun comes first
            if now and step and step % EXECUTED == 0:
                left = np.pad(current[:, :, EXECUTED:], ((0, 0), (0, 0), (0, EXECUTED)))
                upcoming, next_begun = plan(np.full(side.shape, START + step * STEP), side, left), step
            ready = (next_begun + DELAYS == step) & (next_begun > begun)
            last = current[each, :, step - begun]
            current = np.where(ready[:, None, None], upcoming, current)
            begun = np.where(ready, next_begun, begun)
            wanted = current[each, :, step - begun]
            jumps = np.where(ready[:, None], np.maximum(jumps, np.abs(wanted - last)), jumps)
        side = steer(side, wanted)
        safe &= np.hypot(START + (step + 1) * STEP - 0.5, side) > DISC
    return safe, jumps


def drive_with_pauses(plan: Planner, rows: int) -> np.ndarray:
    """Standing still until a plan is ready, so that a delay costs time and nothing else. -> successes [delays, rows]."""
    side, safe = start(rows), np.ones((len(DELAYS), rows), bool)
    steps = round((1 - START) / STEP)
    for step in range(steps):
        if step % EXECUTED == 0:
            current = plan(np.full(side.shape, START + step * STEP), side, None)
        side = steer(side, current[:, :, step % EXECUTED])
        safe &= np.hypot(START + (step + 1) * STEP - 0.5, side) > DISC
    return safe & (steps + (steps - 1) // EXECUTED * DELAYS <= DEADLINE)[:, None]


def start(rows: int) -> np.ndarray:
    return np.tile(0.03 * np.random.default_rng(0).standard_normal(rows), (len(DELAYS), 1))


def steer(side: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return side + np.clip(wanted - side, -FASTEST, FASTEST)


def test_chunks_that_go_on_pass_the_obstacle_more_often_and_jump_less() -> None:
    """Over delays of 0 to 6 steps: more often than by switching regardless, and than by pausing, all given the same noise.

    Jumps are at most half as long over all delays, and at each of those from 4 on: before, the seam may lie where both courses are
    still one, and there is next to nothing to jump.
    """
    # Prefixes of any length, none included, and trained for long enough that the ways which give none drive as well.
    config = toy(intent_width=4, horizon=HORIZON, state=2, action=1, queries=1, prefix=int(DELAYS[-1]), future_weight=0.0)
    driver = train(config, draw_courses, STEPS, RATE).policy
    naive, naive_jumps = drive(planner(driver, "naive", 3), TRIALS)
    pausing = drive_with_pauses(planner(driver, "naive", 3), TRIALS)
    for way in ("guided", "prefix"):
        successes, jumps = drive(planner(driver, way, 3), TRIALS)
        assert successes.sum() >= max(naive.sum(), pausing.sum())
        assert jumps.mean() <= 0.5 * naive_jumps.mean()
        assert (jumps.mean(axis=1) <= 0.5 * naive_jumps.mean(axis=1))[4:].all()
