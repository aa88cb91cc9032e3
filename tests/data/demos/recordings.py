"""Robots and recorded episodes for tests of demonstrations."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.recorder import Form, Recorder
from blm_jax.data.demos.robots import Camera, Dimension, Robot

FIXTURES = Path(__file__).parent / "fixtures"
DIMENSIONS = (*(Dimension(f"joint{i}", "rad", -3, 3) for i in range(1, 7)), Dimension("gripper", "opening", 0, 1, "gripper"))
ARM = Robot("my_arm", DIMENSIONS, DIMENSIONS, (Camera("front", 64, 64), Camera("wrist", 64, 64)), horizon=4, executed=2)
SMALL = Robot("small", DIMENSIONS[-2:], DIMENSIONS[-2:], (Camera("base", 16, 24),), hz=10, horizon=3, executed=1)


def record(robot: Robot, actions: int, seed: int = 0, *, last: bool = True) -> Recording:
    """An episode of so many actions; `last` adds the observation after them."""
    rng = np.random.default_rng(seed)
    count = actions + last
    low, high = ([getattr(dimension, side) for dimension in robot.state] for side in ("low", "high"))
    state, action = (rng.uniform(low, high, (n, len(low))).astype(np.float32) for n in (count, actions))
    images = {camera.name: shades(camera.height, camera.width, count, seed + i) for i, camera in enumerate(robot.cameras)}
    return Recording(f"do {seed}", state, action, images)


def shades(height: int, width: int, count: int, seed: int) -> np.ndarray:
    """Smooth pictures, each of a brightness of its own, [count, height, width, 3]."""
    levels = np.linspace(20, 200, count)[:, None, None, None] + np.array([0, 10, 20]) + 3 * (seed % 9)
    return np.broadcast_to(levels + np.linspace(0, 8, width)[None, None, :, None], (count, height, width, 3)).astype(np.uint8)


def write(path: Path, robot: Robot, lengths: list[int], form: Form = "rlds", *, last: bool = True) -> list[Recording]:
    recordings = [record(robot, length, seed, last=last) for seed, length in enumerate(lengths)]
    with Recorder(path, robot, form) as recorder:
        for recording in recordings:
            recorder.add(recording)
    return recordings


def copied(name: str, path: Path) -> Path:
    """A fixture of one's own, to break."""
    return Path(shutil.copytree(FIXTURES / name, path / name))
