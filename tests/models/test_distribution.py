"""Trained on problems whose answer is known: distributions of actions, futures that follow from actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from blm_jax.batch import Chunks, IntentRows, RobotRows
from blm_jax.config import ComputeConfig, Path, PolicyConfig
from blm_jax.models.bridge import Bridge
from blm_jax.models.objective import cosine, follow, losses, sample
from blm_jax.models.policy import Policy
from tests.models.policies import Inputs, toy

Trained = tuple[Policy, Bridge]


def train(
    config: PolicyConfig, draw: Callable[[jax.Array], Inputs], steps: int, rate: float, loss: Callable[..., jax.Array] | None = None
) -> Trained:
    """Adam on fresh rows each step, the whole loop one program."""
    policy = Policy(config, ComputeConfig(), rngs=nnx.Rngs(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def total(policy: Policy, slow: Bridge, batch: Inputs, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, batch.robots.robot.shape[0])
        found = losses(policy, slow, batch.intent, batch.robots, batch.chunks, batch.future, batch.has_future, keys)
        return found.total(config.objective)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        policy, slow, moments = carry
        for_batch, for_loss = jax.random.split(key)
        value, slope = jax.value_and_grad(loss or total)(policy, slow, draw(for_batch), for_loss)
        updates, moments = optimizer.update(slope, moments)
        policy = optax.apply_updates(policy, updates)
        return (policy, follow(slow, policy.bridge, config.objective.ema), moments), value

    def loop(policy: Policy) -> tuple[Policy, Bridge]:
        carry = policy, policy.bridge, optimizer.init(policy)
        (policy, slow, _), _ = jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), steps))
        return policy, slow

    return jax.jit(loop)(policy)


# Two ways to act, with unequal chances, and which of them is likelier is for the intent to say.

WEIGHTS = np.array([[0.7, 0.3], [0.3, 0.7]])  # [intent, mode]
ARCS = np.stack([np.linspace(-0.5, 1.0, 4), np.sin(np.linspace(0.3, 3.0, 4))], axis=1)  # [horizon, action]
MODES = np.stack([ARCS, -ARCS])
SPREAD = 0.2


def observation(meaning: jax.Array, robots: RobotRows) -> Inputs:
    """meaning [rows] 0 or 1, shown by the second of two intent tokens."""
    rows = meaning.shape[0]
    hidden = jnp.stack([jnp.tile(jnp.array([1.0, -1, 1, -1]), (rows, 1)), jnp.array([[1.0, 1, -1, -1], [-1, -1, 1, 1]])[meaning]], axis=1)
    intent = IntentRows(hidden, jnp.ones((rows, 2), bool), jnp.zeros((rows, 2, 4), jnp.int32))
    nothing = jnp.zeros((rows, *ARCS.shape))
    return Inputs(intent, robots, Chunks(nothing, nothing == 0), intent, jnp.zeros(rows, bool))


def points(rows: int, horizon: int, state: jax.Array | None = None) -> RobotRows:
    """Rows of a robot with all dimensions of its toy."""
    state = jnp.zeros((rows, 1)) if state is None else state
    return RobotRows(jnp.zeros(rows, jnp.int32), state, jnp.ones(state.shape, bool), jnp.ones((rows, horizon, 2), bool))


def true_chunks(key: jax.Array, meaning: jax.Array) -> jax.Array:
    for_mode, for_spread = jax.random.split(key)
    mode = (jax.random.uniform(for_mode, meaning.shape) > jnp.asarray(WEIGHTS[:, 0])[meaning]).astype(jnp.int32)
    # One shared and one own part of the spread, so that steps of a chunk depend on each other within a mode too.
    shape = (*meaning.shape, *ARCS.shape)
    shared, own = jax.random.normal(for_spread, (2, *shape))
    return jnp.asarray(MODES, jnp.float32)[mode] + SPREAD * (0.8 * shared[..., :1, :] + 0.6 * own)


def draw_two_modes(key: jax.Array) -> Inputs:
    for_meaning, for_chunk = jax.random.split(key)
    meaning = jax.random.bernoulli(for_meaning, 0.5, (64,)).astype(jnp.int32)
    made = observation(meaning, points(64, 4))
    return Inputs(made.intent, made.robots, Chunks(true_chunks(for_chunk, meaning), made.chunks.mask), made.future, made.has_future)


def sliced_wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over directions of the distance between sorted projections. one and other [samples, ...]."""
    one, other = (x.reshape(len(x), -1) for x in (one, other))
    directions = np.random.default_rng(0).standard_normal((one.shape[1], 128))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.abs(np.sort(one @ directions, axis=0) - np.sort(other @ directions, axis=0)).mean())
