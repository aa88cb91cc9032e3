"""Pictures of the embedded world a second, and what the two cameras see of each task.

    blm bench world_pictures [--sheet FILE.png] [--save]

Scenes are beginnings of episodes, of all robots and tasks. What is seen is counted over as many beginnings of each: the share in which a
body, or the goal, has twelve pixels in either view; and how far a centimetre moves a point of the table, in the view where it is farther.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import _harness
import numpy as np

BATCH, ROUNDS = 192, 5
RESETS = 200  # of each cell
SEEN = 12  # pixels
TABLE_POINTS = np.stack(np.meshgrid((-0.25, 0, 0.1), (-0.1, 0, 0.1), (0.02, 0.1)), axis=-1).reshape(-1, 3).astype(np.float32)


def beginnings(each: int) -> tuple[Any, Any]:
    """Settings and states of so many episodes of each robot and task, robots first."""
    import jax

    from blm_jax.evaluate.world import arms, tasks

    robots, wanted = np.meshgrid(np.arange(len(arms.ROBOTS)), np.arange(len(tasks.TASKS)), indexing="ij")
    robots, wanted = robots.ravel().repeat(each), wanted.ravel().repeat(each)
    return jax.jit(jax.vmap(tasks.reset))(jax.random.split(jax.random.key(0), len(robots)), robots, wanted)


def speed() -> dict[str, Any]:
    """Of the front camera, and the seconds of compiling one program for it."""
    import jax

    from blm_jax.evaluate.world import render, view

    shapes = jax.jit(jax.vmap(view.shapes))(*beginnings(BATCH // 24))
    start = time.perf_counter()
    make = jax.jit(lambda scenes: render.pictures(scenes, view.CAMERAS["front"], view.SIZE)).lower(shapes).compile()
    compiling = time.perf_counter() - start
    make(shapes).block_until_ready()
    seconds, before, start = [], _harness.foreign_work(), time.perf_counter()
    for _ in range(ROUNDS):
        began = time.perf_counter()
        make(shapes).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return {
        "frames_per_second": round(BATCH / float(np.median(seconds))),
        "frames_per_second_best": round(BATCH / min(seconds)),
        "compile_s": round(compiling, 2),
        "shapes": {kind: int(getattr(shapes, f"{kind}_colour").shape[1]) for kind in ("box", "ball", "rod", "drum")},
        "others_cores": round((_harness.foreign_work() - before) / (time.perf_counter() - start), 2),
    }


def seen() -> dict[str, dict[str, dict[str, float]]]:
    """Robot -> task -> what -> share of beginnings in which it is seen."""
    import jax
    import jax.numpy as jnp

    from blm_jax.evaluate.world import arms, render, tasks, view

    setting, state = beginnings(RESETS)
    shapes = jax.jit(jax.vmap(view.shapes))(setting, state)
    things = view.numbers(jax.tree.map(lambda leaf: leaf[0], shapes))

    def count(camera: render.Camera) -> np.ndarray:
        def of_one(scene: Any) -> jax.Array:
            numbers, _ = render.first_seen(scene, camera, view.SIZE)
            return jnp.stack([sum(jnp.sum(numbers == i) for i in thing) for thing in things.values()])

        return np.asarray(jax.jit(lambda scenes: jax.lax.map(of_one, scenes, batch_size=render.CHUNK))(shapes))

    enough = np.max([count(camera) for camera in view.CAMERAS.values()], axis=0) >= SEEN  # [beginnings, things]
    there = np.concatenate([np.asarray(setting.kind) > 0, np.asarray(setting.goal_seen)[:, None]], axis=1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for i, (robot, task) in enumerate((robot, task) for robot in arms.ROBOTS for task in tasks.TASKS):
        cell = slice(i * RESETS, (i + 1) * RESETS)
        shares = {name: round(float(enough[cell, j][there[cell, j]].mean()), 4) for j, name in enumerate(things) if there[cell, j].any()}
        found.setdefault(robot, {})[task] = shares
    return found


def moved() -> dict[str, dict[str, float]]:
    """Pixels that a centimetre along each axis moves a point, in the better view: the least and the mean."""
    from blm_jax.evaluate.world import render, view

    found = {}
    for i, axis in enumerate("xyz"):
        step = np.eye(3, dtype=np.float32)[i] / 100
        ways = [
            np.linalg.norm(
                render.project(camera, TABLE_POINTS + step, view.SIZE)[0] - render.project(camera, TABLE_POINTS, view.SIZE)[0], axis=-1
            )
            for camera in view.CAMERAS.values()
        ]
        best = np.max(ways, axis=0)
        found[axis] = {"least": round(float(best.min()), 2), "mean": round(float(best.mean()), 2)}
    return found


def sheet(path: Path) -> None:
    """A beginning of each cell: a row a robot and view, a column a task."""
    import jax
    from PIL import Image

    from blm_jax.evaluate.world import arms, tasks, view

    shapes = jax.jit(jax.vmap(view.shapes))(*beginnings(1))
    made = np.asarray(jax.jit(lambda scenes: view.pictures(scenes, 2 * view.SIZE))(shapes))
    by_robot = made.reshape(len(arms.ROBOTS), len(tasks.TASKS), *made.shape[1:]).swapaxes(1, 2)
    Image.fromarray(view.tiled(by_robot.reshape(-1, len(tasks.TASKS), *made.shape[2:]))).save(path)


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="blm bench world_pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write pictures of all robots and tasks, as PNG")
    parser.add_argument("--save", action="store_true", help=f"write the result to {_harness.RESULTS.name}/")
    arguments = parser.parse_args(argv)
    from blm_jax.evaluate.world import view

    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": _harness.hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax")},
        "size": view.SIZE,
        "batch": BATCH,
        **speed(),
        "pixels_per_centimetre": moved(),
        "seen": seen(),
    }
    show(result)
    if arguments.sheet:
        sheet(arguments.sheet)
    if arguments.save:
        _harness.save("world_pictures", result)
    return result


def show(result: dict[str, Any]) -> None:
    print("{frames_per_second} frames/s (best {frames_per_second_best}) of {size} pixels, compiled in {compile_s} s".format(**result))
    print(
        "a centimetre along "
        + ", ".join("{}: {least} to {mean} pixels".format(axis, **way) for axis, way in result["pixels_per_centimetre"].items())
    )
    for robot, cells in result["seen"].items():
        for task, shares in cells.items():
            print(f"{robot:10} {task:16} " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
    if result["others_cores"] > 0.1:
        print(f"note: other processes kept {result['others_cores']} cores busy meanwhile", file=sys.stderr)


if __name__ == "__main__":
    _harness.run_as_script("world_pictures", main)
