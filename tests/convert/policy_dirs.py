"""A small random policy of the package's robots as a directory policy/, and what robots say to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from blm_jax.config import PolicyConfig
from blm_jax.data.demos import statistics
from blm_jax.data.demos.robots import Robot, load_robots
from blm_jax.models.policy import abstract_policy
from blm_jax.weights.policy import PolicyFiles

BACKBONE = "sha256:" + "0" * 64
HORIZONS = {"panda": 7, "xarm6": 5, "xarm7": 7, "widowxai": 6}
SCHEMES: dict[str, statistics.Scheme] = {"panda": "quantile", "xarm6": "mean_std", "xarm7": "min_max", "widowxai": "quantile"}


def make_files(config: PolicyConfig, backbone: str = BACKBONE) -> PolicyFiles:
    """Chunks of different lengths, one robot whose actions are absolute, one with a dimension that never moves."""
    rng = np.random.default_rng(1)
    known = {name: replace(load_robots()[name], horizon=horizon, executed=3) for name, horizon in HORIZONS.items()}
    known["xarm7"] = replace(known["xarm7"], relative=False)
    robots = {name: known[name] for name in config.robots}
    return PolicyFiles(config, robots, {name: make_statistics(robot, rng) for name, robot in robots.items()}, backbone)


def make_statistics(robot: Robot, rng: np.random.Generator) -> statistics.Statistics:
    states = make_states(robot, rng, 200)
    actions = states[:, None] + rng.normal(0, 0.05, (200, robot.horizon, len(robot.action)))
    if robot.name == "widowxai":
        states[:, 2] = actions[:, :, 2] = 0.7
    return statistics.from_arrays(robot, states, actions, scheme=SCHEMES[robot.name])


def make_states(robot: Robot, rng: np.random.Generator, count: int) -> np.ndarray:
    low, high = (np.array([getattr(dimension, side) for dimension in robot.state]) for side in ("low", "high"))
    return low + (high - low) * rng.uniform(0.2, 0.8, (count, len(low)))


def make_params(config: PolicyConfig, seed: int = 0) -> dict[str, Any]:
    """Far from weights before any training, where biases are zero and most products all but vanish: here everything has its effect."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return (0.15 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_policy(config))
