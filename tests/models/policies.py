"""Small random policies and what they are given: rows of observations, robots, chunks of actions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blm_jax.batch import Chunks, IntentRows, RobotRows
from blm_jax.config import BridgeConfig, ComputeConfig, DiTConfig, EmbodimentConfig, ObjectiveConfig, PolicyConfig
from blm_jax.models.policy import Policy

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


def make_policy(config: PolicyConfig = SMALL, compute: ComputeConfig = ComputeConfig(), *, seed: int = 0) -> Policy:
    """Far from its initial weights, where biases are zero and most products all but vanish: here everything has its effect."""
    policy = Policy(config, compute, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.15 * rng.standard_normal(leaf.shape), leaf.dtype), policy)


@dataclass(frozen=True)
class Inputs:
    """Of one training step, as NumPy arrays. Absent dimensions hold junk."""

    intent: IntentRows
    robots: RobotRows
    chunks: Chunks
    future: IntentRows
    has_future: np.ndarray  # [rows] bool

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


def make_noise(config: PolicyConfig, rows: int, *, seed: int = 0) -> np.ndarray:
    shape = (rows, config.horizon, config.embodiment.action_width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def toy(*, intent_width: int, horizon: int, state: int = 1, action: int = 2, queries: int = 2, **objective: Any) -> PolicyConfig:
    """Of one robot, for a problem that trains in seconds: a DiT of about 1e5 parameters."""
    return PolicyConfig(
        robots=("point",),
        intent_block=0,
        intent_width=intent_width,
        horizon=horizon,
        bridge=BridgeConfig(queries=queries, blocks=1, width=32, heads=2, ffn=64, cameras=1),
        dit=DiTConfig(layers=4, heads=4, head_dim=12, ffn=96, tap=4, dropout=0.0, time_features=32),
        embodiment=EmbodimentConfig(state_width=state, action_width=action, hidden=48),
        objective=ObjectiveConfig(**objective),
    )
