"""Episodes of the embedded world a second against how many are worked on at once, a policy at the controls.

    blm bench world_episodes MODEL [--tasks A,B] [--batches 8,32,128] [--save]

A batch goes from its beginning to the steps that `blm eval world` allows, all of it in compiled programs. Beside it the same without a
policy: arms that wander, and nobody looks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
import time
from typing import Any

import _harness
import numpy as np

ROUNDS = 3


def seconds(driver: Any, rows_of: Any, robots: list[str], wanted: list[str], batch: int) -> dict[str, float]:
    """Of a batch, the best of some rounds, and of compiling its program."""
    import jax

    from blm_jax import mesh as meshes
    from blm_jax.config import MeshConfig
    from blm_jax.evaluate.world import tasks
    from blm_jax.evaluate.world.runs import cells, rollout

    mesh = meshes.make_mesh(MeshConfig(-1, 1, 1))
    count = batch * mesh.size
    each = -(-count // (len(robots) * len(wanted)))
    episodes = cells.episodes_of(robots, wanted, each).part(np.arange(count))
    settings, states = cells.begin(np.uint32(0), *episodes, kind=cells.EVALUATION, two=False)
    rows, limits = rows_of(settings, episodes), np.array(tasks.LIMITS, np.int32)[episodes.task]
    turn, own = rollout.make_turn(driver, mesh, batch), list(range(count))
    turns = -(-int(limits.max()) // driver.turn)

    def play() -> float:
        progress = rollout.started(driver, rows, settings, states)
        own_rows, own_settings, own_limits, at = (rollout.put(part, mesh, own, count) for part in (rows, settings, limits, progress))
        jax.block_until_ready((own_rows, own_settings, own_limits, at))
        start = time.perf_counter()
        for number in range(turns):
            at, _ = turn(driver.values, own_rows, own_settings, own_limits, at, np.int32(number))
        jax.block_until_ready(at)
        return time.perf_counter() - start

    with meshes.use(mesh):
        first = play()
        best = min(play() for _ in range(ROUNDS))
    return {"episodes": count, "steps": int(limits.sum()), "seconds": best, "compile_s": first - best}


def against_batch(model: str, wanted: list[str], batches: list[int]) -> list[dict[str, Any]]:
    from blm_jax import mesh as meshes
    from blm_jax.config import ComputeConfig, MeshConfig
    from blm_jax.evaluate.world.arms import ROBOTS
    from blm_jax.evaluate.world.runs import cells, rollout
    from blm_jax.evaluate.world.runs.pilot import Pilot
    from blm_jax.infer.act import load_actor

    pilot = Pilot(load_actor(model, meshes.make_mesh(MeshConfig(-1, 1, 1)), ComputeConfig()))
    robots = list(pilot.robots)

    def told_of(settings: Any, episodes: Any) -> Any:
        texts = cells.instructions(settings, episodes.number)
        return pilot.rows([ROBOTS[robot] for robot in episodes.robot], texts, episodes.serial)

    found = []
    for batch in batches:
        for name, driver, rows_of in (("policy", pilot, told_of), ("nobody", rollout.Random(), lambda _, episodes: episodes.serial)):
            took = seconds(driver, rows_of, robots, wanted, batch)
            per_second = {what: round(took[what] / took["seconds"], 2) for what in ("episodes", "steps")}
            found.append({"batch": batch, "driver": name, "per_second": per_second, "compile_s": round(took["compile_s"], 1)})
            print("{batch:>5} at once, {driver}: {per_second[episodes]} episodes/s, {per_second[steps]} steps/s".format(**found[-1]))
    return found


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="blm bench world_episodes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="whose policy drives the world's robots")
    parser.add_argument("--tasks", default="PickCube,PushCube,PullCube", metavar="A,B", help="(PickCube,PushCube,PullCube)")
    parser.add_argument("--batches", default="8,32,128", metavar="N,M", help="episodes that each device works on at once (8,32,128)")
    parser.add_argument("--save", action="store_true", help=f"write the result to {_harness.RESULTS.name}/")
    arguments = parser.parse_args(argv)
    before, start = _harness.foreign_work(), time.perf_counter()
    wanted = arguments.tasks.split(",")
    found = against_batch(arguments.model, wanted, [int(number) for number in arguments.batches.split(",")])
    others = round((_harness.foreign_work() - before) / (time.perf_counter() - start), 2)
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": _harness.hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax")},
        "tasks": wanted,
        "found": found,
        "others_cores": others,
    }
    if arguments.save:
        _harness.save("world_episodes", result)
    if others > 0.1:
        print(f"note: other processes kept {others} cores busy meanwhile", file=sys.stderr)
    return result


if __name__ == "__main__":
    _harness.run_as_script("world_episodes", main)
