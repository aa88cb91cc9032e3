"""Whether an export acts in PyTorch as it does here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blm_jax.data.demos.observation import Observation, encode
from blm_jax.errors import RunError
from blm_jax.infer.act import load_actor, noise_of_rows

SCRIPT = Path(__file__).parent / "in_pytorch.py"
PACKAGES = ("torch", "transformers")


def largest_difference(export: str, observations: Sequence[Observation], robots: Sequence[str], seed: int = 0) -> float | None:
    """Of any number of any action, in the robots' units; None where PyTorch is not installed."""
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        return None
    actor = load_actor(export)
    config, engine = actor.policy.config, actor.engine
    made = actor.sample_actions(observations, robots, seed=seed)
    noise = np.asarray(noise_of_rows(seed, jax.numpy.arange(len(robots)), 1, config))
    inputs: dict[str, Any] = {"robots": np.array(robots)}
    for number, (observation, robot) in enumerate(zip(observations, robots, strict=True)):
        example = encode(observation, actor.files.find(robot), engine, config.instruction)
        grids = [picture.grid for picture in example.pictures]
        inputs |= {
            f"{number}/tokens": example.tokens[None].astype(np.int64),
            f"{number}/pixels": np.concatenate([picture.patches for picture in example.pictures]),
            f"{number}/grids": np.array([(grid.frames, grid.rows, grid.columns) for grid in grids]),
            f"{number}/state": observation.state,
            f"{number}/noise": noise[number][None, None],
        }
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "inputs.npz", Path(folder) / "actions.npz"
        np.savez(given, **inputs)
        done = subprocess.run([sys.executable, str(SCRIPT), export, str(given), str(out)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"PyTorch could not act with {export}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        with np.load(out) as found:
            return max(float(np.abs(found[str(number)] - chunk).max()) for number, chunk in enumerate(made))
