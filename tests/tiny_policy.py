"""A small random policy beside a small random Qwen2.5-VL: `python -m tests.tiny_policy DIRECTORY`.

DIRECTORY is what `python -m tests.tiny_model` wrote; seen.npz, which is put there too, is what a Panda saw. The actions mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blm_jax.config import BridgeConfig, DiTConfig, EmbodimentConfig, ObjectiveConfig, PolicyConfig
from blm_jax.data.demos.observation import Observation
from blm_jax.data.demos.robots import Robot
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.policy import write_policy
from tests.convert.policy_dirs import make_files, make_params, make_states

CONFIG = PolicyConfig(
    intent_block=1,
    intent_width=64,
    horizon=8,
    bridge=BridgeConfig(queries=4, blocks=1, width=32, heads=2, ffn=48, cameras=3),
    dit=DiTConfig(layers=4, heads=2, head_dim=16, ffn=48, tap=2, time_features=16),
    embodiment=EmbodimentConfig(state_width=12, action_width=10, hidden=24),
    objective=ObjectiveConfig(steps=3, prefix=2),
)


def write_tiny_policy(directory: Path) -> Path:
    write_policy(directory / "policy", make_files(CONFIG, fingerprint(directory)), make_params(CONFIG))
    return directory


def observe(robot: Robot, seed: int, instruction: str = "Put the red cube on the green one.") -> Observation:
    rng = np.random.default_rng(seed)
    images = {camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8) for camera in robot.cameras}
    return Observation(make_states(robot, rng, 1)[0], images, instruction)


def write_observations(path: Path, observations: Sequence[Observation], **changes: np.ndarray) -> Path:
    arrays: dict[str, Any] = {"state": np.stack([one.state for one in observations])}
    arrays["instruction"] = np.array([one.instruction for one in observations])
    for name in dict(observations[0].images):
        arrays[f"images/{name}"] = np.stack([dict(one.images)[name] for one in observations])
    merged: dict[str, Any] = arrays | changes
    np.savez(path, **merged)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m tests.tiny_policy DIRECTORY")
    target = write_tiny_policy(Path(sys.argv[1]))
    panda = make_files(CONFIG).robots["panda"]
    write_observations(target / "seen.npz", [observe(panda, 0), observe(panda, 1, "Push the cube to the left.")])
    print(f"{target}: a small random policy, and what a Panda saw in seen.npz")
