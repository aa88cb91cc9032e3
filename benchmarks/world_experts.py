"""How often the embedded world's experts succeed, cell by cell, and how long they take.

    python benchmarks/world_experts.py [--episodes N] [--noise RADIANS] [--other] [--save]

Success must hold for the episode's last half second; a length is the number of steps until it holds for good.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _harness import Result, hardware, run_as_script, save

from blm_jax.evaluate.world import experts, physics, tasks
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.tasks import TASKS

HELD = 10  # steps


def play(steps: int, noise: float, other: bool, key: jax.Array, robot: jax.Array, task: jax.Array) -> jax.Array:
    """Whether the task's rule holds after each step [steps] of an episode."""
    place_key, key = jax.random.split(key)
    setting, state = tasks.reset(place_key, robot, task, other)

    def step(carry: Any, key: jax.Array):
        state, memory, off = carry
        action, memory = experts.act(setting, state, memory)
        off = experts.drifted(memory, off, key, noise)
        state = physics.step(setting, state, action.at[:-1].add(off))
        return (state, memory, off), tasks.succeeded(setting, state)

    carry = (state, experts.begin(setting, state), jnp.zeros_like(state.joints))
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[1]


def measure(episodes: int, steps: int, noise: float, other: bool, seed: int) -> Result:
    robot, task, _ = (column.ravel() for column in np.meshgrid(range(len(ROBOTS)), range(len(TASKS)), range(episodes), indexing="ij"))
    keys = jax.random.split(jax.random.key(seed), len(robot))
    program = jax.jit(jax.vmap(lambda key, robot, task: play(steps, noise, other, key, robot, task)))
    start = time.perf_counter()
    compiled = program.lower(keys, robot, task).compile()
    ready = time.perf_counter()
    success = np.asarray(compiled(keys, robot, task)).reshape(len(ROBOTS), len(TASKS), episodes, steps)
    end = time.perf_counter()

    lasting = np.all(success[..., -HELD:], axis=-1)
    length = np.where(success.all(-1), 0, steps - np.argmax(~success[..., ::-1], axis=-1)) + 1
    cells = {
        f"{name} {task_name}": {"success": float(lasting[i, j].mean()), "steps": round(float(length[i, j][lasting[i, j]].mean()), 1)}
        for i, name in enumerate(ROBOTS)
        for j, task_name in enumerate(TASKS)
        if lasting[i, j].any()
    }
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax")},
        "terms": {"episodes": episodes, "steps": steps, "noise": noise, "other": other, "seed": seed},
        "compile_seconds": round(ready - start, 1),
        "steps_a_second": round(len(robot) * steps / (end - ready)),
        "success": float(lasting.mean()),
        "cells": cells,
    }


def main(argv: list[str]) -> Result:
    parser = argparse.ArgumentParser(
        prog="blm bench world_experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=200, help="of a cell (default: 200)")
    parser.add_argument("--steps", type=int, default=90, help="of an episode (default: 90)")
    parser.add_argument("--noise", type=float, default=0.0, help="radians by which joints stray (default: 0)")
    parser.add_argument("--other", action="store_true", help="with a second cube beside the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write the result to results/")
    options = parser.parse_args(argv)
    result = measure(options.episodes, options.steps, options.noise, options.other, options.seed)
    for name, cell in result["cells"].items():
        print(f"{name:24} {cell['success']:7.1%} {cell['steps']:6.1f} steps")
    print(f"{result['success']:.2%} in all; compiled in {result['compile_seconds']} s, {result['steps_a_second']} steps/s")
    if options.save:
        save("world_experts", result)
    return result


if __name__ == "__main__":
    run_as_script("world_experts", main)
