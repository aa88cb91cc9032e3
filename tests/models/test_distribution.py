"""Trained on problems whose answer is known: distributions of actions, futures that follow from actions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.batch import Chunks, IntentRows, RobotRows
from blm_jax.config import Path, PolicyConfig
from blm_jax.models.bridge import Bridge
from blm_jax.models.objective import cosine, sample
from blm_jax.models.policy import Policy
from tests.models.policies import OPTIMISED, Inputs, make_noise, toy, train

# Two ways to act, one the other's mirror image, with unequal chances; which is likelier is for the intent to say.

HORIZON = 2
WEIGHTS = np.array([[0.7, 0.3], [0.3, 0.7]])  # [intent, mode]
WAY = np.array([[-0.5, 0.3], [1.0, 0.14]])  # [horizon, action]
MODES = np.stack([WAY, -WAY])
SPREAD = 0.3  # of each mode
ROWS, STEPS, RATE = 160, 640, 4e-3  # of training
SETS, SAMPLES = 16, 256  # that are compared, for each intent
DIRECTIONS = 128


def show(meaning: jax.Array, rows: int) -> tuple[IntentRows, RobotRows]:
    """meaning [rows] 0 or 1, shown by the second of two intent tokens. The state has nothing to say."""
    looks = jnp.array([[1.0, 1, -1, -1], [-1, -1, 1, 1]])[meaning]
    hidden = jnp.stack([jnp.tile(jnp.array([1.0, -1, 1, -1]), (rows, 1)), looks], axis=1)
    return intent_of(hidden), robots_of(jnp.zeros((rows, 1)), HORIZON)


def intent_of(hidden: jax.Array) -> IntentRows:
    """hidden [rows, tokens, width]."""
    return IntentRows(hidden, jnp.ones(hidden.shape[:2], bool), jnp.zeros((*hidden.shape[:2], 4), jnp.int32))


def robots_of(state: jax.Array, horizon: int) -> RobotRows:
    rows = len(state)
    return RobotRows(jnp.zeros(rows, jnp.int32), state, jnp.ones(state.shape, bool), jnp.ones((rows, horizon, 2), bool))


def true_chunks(key: jax.Array, meaning: jax.Array) -> jax.Array:
    for_mode, for_spread = jax.random.split(key)
    mode = (jax.random.uniform(for_mode, meaning.shape) > jnp.asarray(WEIGHTS[:, 0])[meaning]).astype(jnp.int32)
    # One shared and one own part of the spread, so that steps of a chunk depend on each other within a mode too.
    shared, own = jax.random.normal(for_spread, (2, *meaning.shape, *WAY.shape))
    return jnp.asarray(MODES, jnp.float32)[mode] + SPREAD * (0.8 * shared[..., :1, :] + 0.6 * own)


def draw_two_ways(key: jax.Array) -> Inputs:
    for_meaning, for_chunk = jax.random.split(key)
    meaning = jax.random.bernoulli(for_meaning, 0.5, (ROWS,)).astype(jnp.int32)
    intent, robots = show(meaning, ROWS)
    chunks = Chunks(true_chunks(for_chunk, meaning), robots.action_mask)
    return Inputs(intent, robots, chunks, intent, jnp.zeros(ROWS, bool))


def two_ways(path: Path = "flow") -> PolicyConfig:
    return toy(intent_width=4, horizon=HORIZON, queries=1, path=path, future_weight=0.0)


def sliced_wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Between samples, [sets, samples, horizon, action] each: mean over directions, and over all pairs of sets.

    Sets of a few hundred differ by as much as the counts of their modes do, so one pair would say little.
    """
    directions = np.random.default_rng(0).standard_normal((WAY.size, DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    one, other = (np.sort(x.reshape(*x.shape[:2], -1) @ directions, axis=1) for x in (one, other))
    return float(np.mean([np.abs(one - others).mean() for others in other]))


@pytest.fixture(scope="module")
def regression() -> np.ndarray:
    """What the same network says to each intent, trained to say one answer with the least squared error. [intent, horizon, action]"""

    def answer(policy: Policy, intent: IntentRows, robots: RobotRows) -> jax.Array:
        nothing = jnp.zeros(robots.action_mask.shape)
        return policy.velocity(policy.condition(intent, robots), nothing, jnp.zeros(1)).actions

    def squared_error(policy: Policy, slow: Bridge, batch: Inputs, key: jax.Array) -> jax.Array:
        return jnp.mean((answer(policy, batch.intent, batch.robots) - batch.chunks.actions) ** 2)

    policy = train(two_ways(), draw_two_ways, 200, RATE, squared_error).policy
    return np.asarray(jax.jit(lambda policy: answer(policy, *show(jnp.arange(2), 2)))(policy))


@pytest.mark.parametrize("path", ["flow", "clean", "ddim"])
def test_more_steps_come_nearer_to_two_ways_of_acting_than_one_answer_can(path: Path, regression: np.ndarray) -> None:
    config = two_ways(path)
    # "clean" is for observations that all but decide actions: of two ways that are both open it learns more slowly.
    policy = train(config, draw_two_ways, 4 * STEPS if path == "clean" else STEPS, RATE).policy
    both, shape = jnp.arange(2), (2, SETS, SAMPLES, *WAY.shape)
    noise = make_noise(config, 2 * SETS * SAMPLES)

    @partial(jax.jit, compiler_options=OPTIMISED)
    def run(policy: Policy) -> dict[int, jax.Array]:
        condition = policy.condition(*show(both, 2))
        return {steps: sample(policy, condition, noise, steps).reshape(shape) for steps in (1, 4, 16)}

    made = jax.tree.map(np.asarray, run(policy))
    true = np.asarray(true_chunks(jax.random.key(0), jnp.repeat(both, SETS * SAMPLES)).reshape(shape))
    for meaning in (0, 1):
        one, four, sixteen = (sliced_wasserstein(made[steps][meaning], true[meaning]) for steps in (1, 4, 16))
        floor = sliced_wasserstein(true[meaning], true[meaning]) * SETS / (SETS - 1)  # no set is at a distance from itself
        only = sliced_wasserstein(np.broadcast_to(regression[meaning], (1, SAMPLES, *WAY.shape)), true[meaning])
        assert sixteen <= four < one
        assert sixteen <= 1.5 * floor
        assert only >= 5 * sixteen
        likelier = (np.sum(made[16][meaning] * WAY, axis=(-2, -1)) > 0).mean()
        assert abs(likelier - WEIGHTS[meaning, 0]) < 0.05


# A thing at some place, and actions that move it: what is seen after them follows from both.

LOOKS = np.random.default_rng(3).standard_normal((2, 20)).astype(np.float32)
HELD_OUT = 256


def scene(place: jax.Array) -> IntentRows:
    """place [rows, 2] in [-1, 1]: a token for each axis, whose features say where by two waves, and which axis."""
    angles = place[..., None] * jnp.arange(1, 3)
    waves = 2 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return intent_of(jnp.concatenate([waves, jnp.broadcast_to(jnp.asarray(LOOKS), (len(place), *LOOKS.shape))], axis=-1))


def draw_moves(key: jax.Array, rows: int = 64) -> Inputs:
    """Actions bring the thing to where the state says, each step its part of the way."""
    place, goal = jax.random.uniform(key, (2, rows, 2), minval=-1)
    chunk = jnp.tile(((goal - place) / 1.2)[:, None], (1, 4, 1))
    return Inputs(scene(place), robots_of(goal, 4), Chunks(chunk, jnp.ones(chunk.shape, bool)), scene(goal), jnp.ones(rows, bool))


def effective_rank(tokens: np.ndarray) -> float:
    """tokens [rows, queries, width]: e to the entropy of their singular values."""
    values = np.linalg.svd(tokens.reshape(-1, tokens.shape[-1]), compute_uv=False)
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares + 1e-12)).sum()))


def test_the_future_is_foreseen_and_its_target_does_not_collapse() -> None:
    config = toy(intent_width=24, horizon=4, state=2, ema=0.99, future_weight=0.5)
    policy, slows = train(config, draw_moves, 400, 4e-3)
    held = draw_moves(jax.random.key(99), HELD_OUT)

    @jax.jit
    def look(policy: Policy, slows: Bridge) -> tuple[jax.Array, jax.Array, jax.Array]:
        said = policy.velocity(policy.condition(held.intent, held.robots), held.chunks.actions, jnp.full(1, 0.95))
        slow = jax.tree.map(lambda leaf: leaf[-1], slows)
        return said.future, slow(held.intent), jax.vmap(lambda slow: slow(held.future))(slows)

    foreseen, present, futures = look(policy, slows)
    right, other, copied = (float(cosine(x, futures[-1]).mean()) for x in (foreseen, jnp.roll(foreseen, 1, axis=0), present))
    assert right >= other + 0.1
    assert right > copied
    ranks = [effective_rank(future) for future in np.asarray(futures)]
    assert min(ranks) >= 0.5 * ranks[0]
