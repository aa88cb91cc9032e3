"""Small random policies and what they are given: rows of observations, robots, chunks of actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from blm_jax.batch import Array, Chunks, IntentRows, RobotRows
from blm_jax.config import BridgeConfig, ComputeConfig, DiTConfig, EmbodimentConfig, ObjectiveConfig, PolicyConfig
from blm_jax.models.bridge import Bridge
from blm_jax.models.objective import follow, losses
from blm_jax.models.policy import Policy, abstract_policy, policy_with_params

# Odd sizes, all different where they may be, so that axes which are mistaken for one another do not fit.
SMALL = PolicyConfig(
    intent_block=1,
    intent_width=24,
    horizon=7,
    bridge=BridgeConfig(queries=3, blocks=2, width=32, heads=2, ffn=40, cameras=3),
    dit=DiTConfig(layers=4, heads=4, head_dim=10, ffn=56, tap=2, dropout=0.0, time_features=16),
    embodiment=EmbodimentConfig(state_width=14, action_width=9, hidden=24),
)

# By row of the robots' table: dimensions of state and action, steps of a chunk.
LAYOUTS = ((14, 9, 7), (6, 7, 5), (7, 8, 7), (12, 7, 6))


def small(
    *, objective: dict[str, Any] | None = None, dit: dict[str, Any] | None = None, embodiment: dict[str, Any] | None = None
) -> PolicyConfig:
    return replace(
        SMALL,
        objective=replace(SMALL.objective, **(objective or {})),
        dit=replace(SMALL.dit, **(dit or {})),
        embodiment=replace(SMALL.embodiment, **(embodiment or {})),
    )


def make_policy(config: PolicyConfig = SMALL, *, seed: int = 0) -> Policy:
    """Far from its initial weights, where biases are zero and most products all but vanish: here everything has its effect."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray((path[-1].key == "scale") + 0.15 * rng.standard_normal(shape.shape), shape.dtype)

    # Drawn on the host: to initialise each parameter in JAX is to compile a hundred programs that run once.
    return policy_with_params(config, ComputeConfig(), jax.tree_util.tree_map_with_path(leaf, abstract_policy(config)))


@dataclass(frozen=True)
class Inputs:
    """Of one training step, as NumPy arrays. Absent dimensions hold junk."""

    intent: IntentRows
    robots: RobotRows
    chunks: Chunks
    future: IntentRows
    has_future: Array  # [rows] bool

    @property
    def rows(self) -> int:
        return len(self.robots.robot)

    def take(self, rows: Any) -> Inputs:
        return jax.tree.map(lambda leaf: leaf[rows], self)


jax.tree_util.register_dataclass(Inputs, ["intent", "robots", "chunks", "future", "has_future"], [])


def make_intent(config: PolicyConfig, rng: np.random.Generator, lengths: list[int], tokens: int) -> IntentRows:
    """Rows of so many tokens, the last third of each text, then padding that holds junk."""
    rows = len(lengths)
    mask = np.arange(tokens) < np.asarray(lengths)[:, None]
    vision = np.arange(tokens) < np.asarray(lengths)[:, None] * 2 // 3
    places = rng.integers(0, 6, (rows, tokens, 4))
    places[..., 0] = rng.integers(1, config.bridge.cameras + 1, (rows, tokens))
    places = np.where(vision[..., None], places, 0)
    return IntentRows(rng.standard_normal((rows, tokens, config.intent_width)).astype(np.float32), mask, places.astype(np.int32))


def make_inputs(config: PolicyConfig = SMALL, rows: int = 4, tokens: int = 11, *, seed: int = 0) -> Inputs:
    """Row i has robot i (of as many as there are), an intent of its own length, and an episode that may end within its chunk."""
    rng = np.random.default_rng(seed)
    robot = np.arange(rows) % len(config.robots)
    horizon, widths = config.horizon, config.embodiment
    states, actions, steps = (np.asarray(LAYOUTS)[robot].T)[:, :, None]
    state_mask = np.arange(widths.state_width) < states
    action_mask = (np.arange(widths.action_width) < actions)[:, None] & (np.arange(horizon) < steps)[..., None]
    ends = rng.integers(2, horizon + 3, (rows, 1, 1))
    lengths = rng.integers(3, tokens + 1, (2, rows))
    return Inputs(
        intent=make_intent(config, rng, list(lengths[0]), tokens),
        robots=RobotRows(
            robot.astype(np.int32), rng.standard_normal((rows, widths.state_width)).astype(np.float32), state_mask, action_mask
        ),
        chunks=Chunks(
            rng.standard_normal((rows, horizon, widths.action_width)).astype(np.float32),
            action_mask & (np.arange(horizon)[:, None] < ends),
        ),
        future=make_intent(config, rng, list(lengths[1]), tokens),
        has_future=np.arange(rows) % 3 != 1,
    )


def make_noise(config: PolicyConfig, rows: int, *, seed: int = 0) -> Array:
    shape = (rows, config.horizon, config.embodiment.action_width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def toy(*, intent_width: int, horizon: int, state: int = 1, action: int = 2, queries: int = 2, **objective: Any) -> PolicyConfig:
    """Of one robot, for a problem that trains in seconds: a DiT of some 6e4 parameters."""
    return PolicyConfig(
        robots=("point",),
        intent_block=1,
        intent_width=intent_width,
        horizon=horizon,
        bridge=BridgeConfig(queries=queries, blocks=1, width=32, heads=2, ffn=64, cameras=1),
        dit=DiTConfig(layers=2, heads=4, head_dim=12, ffn=128, tap=2, dropout=0.0, time_features=32),
        embodiment=EmbodimentConfig(state_width=state, action_width=action, hidden=48),
        objective=ObjectiveConfig(**objective),
    )


class Trained(NamedTuple):
    policy: Policy
    slows: Bridge  # the slow copies of the bridge, [PARTS + 1, ...] each leaf: before training, after each part of it


PARTS = 8

# Of LLVM, which the tests have turned off: what runs a thousand times is worth it. With XLA's newer emitters of fusions the training
# loops compile twice as long, and run a quarter longer.
OPTIMISED = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}


def train(
    config: PolicyConfig,
    draw: Callable[[jax.Array], Inputs],
    steps: int,
    rate: float,
    loss: Callable[[Policy, Bridge, Inputs, jax.Array], jax.Array] | None = None,
) -> Trained:
    """Adam on fresh rows each step, the whole loop one program. Parameters are one vector: so it compiles and runs faster."""
    policy = make_policy(config)  # the usual 0.02 is for widths of a thousand and more: here it takes twice the steps
    vector, to_policy = ravel_pytree(policy)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def total(policy: Policy, slow: Bridge, batch: Inputs, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, batch.robots.robot.shape[0])
        found = losses(policy, slow, batch.intent, batch.robots, batch.chunks, batch.future, batch.has_future, keys)
        return found.total(config.objective)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        vector, slow, moments = carry
        for_batch, for_loss = jax.random.split(key)
        batch = draw(for_batch)
        slope = jax.grad(lambda vector: (loss or total)(to_policy(vector), slow, batch, for_loss))(vector)
        updates, moments = optimizer.update(slope, moments)
        vector = vector + updates
        return (vector, follow(slow, to_policy(vector).bridge, config.objective.ema), moments), None

    def part(carry: Any, keys: jax.Array) -> tuple[Any, Bridge]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, carry[1]

    def loop(vector: jax.Array) -> Trained:
        carry = vector, policy.bridge, optimizer.init(vector)
        (vector, *_), slows = jax.lax.scan(part, carry, jax.random.split(jax.random.key(1), (PARTS, steps // PARTS)))
        return Trained(to_policy(vector), jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), policy.bridge, slows))

    return jax.jit(loop, compiler_options=OPTIMISED)(vector)
