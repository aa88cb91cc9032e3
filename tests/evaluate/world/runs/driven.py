"""A small random policy that drives the world's robots."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blm_jax.config import BridgeConfig, DiTConfig, EmbodimentConfig, ObjectiveConfig, PolicyConfig
from blm_jax.data.demos import statistics
from blm_jax.data.demos.robots import Robot, load_robots
from blm_jax.evaluate.world.runs.cells import PREFIX
from blm_jax.evaluate.world.talk.base import write_untrained
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.policy import PolicyFiles, write_policy
from tests.convert.policy_dirs import make_params

CONFIG = PolicyConfig(
    robots=("world_xarm6", "world_panda"),
    intent_block=1,
    intent_width=128,
    bridge=BridgeConfig(queries=4, blocks=1, width=32, heads=2, ffn=48),
    dit=DiTConfig(layers=2, heads=2, head_dim=16, ffn=48, tap=2, time_features=16),
    embodiment=EmbodimentConfig(state_width=10, action_width=9, hidden=24),
    objective=ObjectiveConfig(steps=2),
)


def write_driver(directory: Path) -> Path:
    write_untrained(directory)
    robots = {name: load_robots()[name] for name in CONFIG.robots}
    files = PolicyFiles(CONFIG, robots, {name: _statistics(robot) for name, robot in robots.items()}, fingerprint(directory))
    write_policy(directory / "policy", files, make_params(CONFIG))
    return directory


def _statistics(robot: Robot) -> statistics.Statistics:
    rng = np.random.default_rng(len(robot.name.removeprefix(PREFIX)))
    low, high = (np.array([getattr(dimension, side) for dimension in robot.state]) for side in ("low", "high"))
    states = low + (high - low) * rng.uniform(0.3, 0.7, (100, len(low)))
    actions = states[:, None] + rng.normal(0, 0.05, (100, robot.horizon, len(robot.action)))
    return statistics.from_arrays(robot, states, actions)
