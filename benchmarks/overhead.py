"""What the host does between two steps: the loop's own work, where the devices would be done at once.

    blm bench overhead [--steps N] [--save]

A run of Stage II from files goes through the very loop of `blm train`, but its step answers at once with what an earlier one has made, so
all that is left is the loop: a batch taken and put on the device, the step's arguments handed over, numbers fetched and written, the
display. Waits for data are told apart. Bound: 1 ms, a hundredth of a step of 100 ms.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _harness
from _harness import Result

STEPS = 2000


class Instant:
    """A compiled step that answers with what it answered first."""

    def __init__(self, step: Any):
        self.step, self.made, self.begun = step, None, 0.0

    def lower(self, *arguments: Any) -> Instant:
        self.step = self.step.lower(*arguments)
        return self

    def compile(self, options: Any) -> Instant:
        self.step = self.step.compile(options)
        return self

    def __call__(self, *arguments: Any) -> Any:
        if self.made is None:
            import jax

            self.made = jax.block_until_ready(self.step(*arguments))
            self.begun = time.perf_counter()
        return self.made


def measure(steps: int) -> Result:
    from blm_jax.recipe import CheckpointConfig, LogConfig
    from blm_jax.train import command, loop
    from blm_jax.train.outline import Outline

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.train.worlds import make_world

    found: dict[str, Any] = {}
    whole, made = Outline.step, []

    def step(outline: Outline) -> Any:
        made.append(Instant(whole(outline)))
        return made[-1]

    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        run = world.stage_two(Path(folder) / "run", steps=steps, checkpoints=CheckpointConfig(every=10**9), log=LogConfig(every=10))
        Outline.step = step  # type: ignore[method-assign]
        saved, loop.save = loop.save, lambda *_: found.setdefault("end", time.perf_counter())  # the state is that of another step
        try:
            result = command.train_run(replace(run, workers=0))
        finally:
            Outline.step, loop.save = whole, saved  # type: ignore[method-assign]
    seconds = found["end"] - made[0].begun
    data = result["shares"]["data"] * result["wall_seconds"]
    return {
        "steps": steps,
        "milliseconds_a_step": 1e3 * (seconds - data) / (steps - 1),
        "milliseconds_a_step_waiting_for_data": 1e3 * data / (steps - 1),
        "bound": 1.0,
    }


def main(argv: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="blm bench overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--save", action="store_true", help=f"write the result to {_harness.RESULTS.name}/")
    arguments = parser.parse_args(argv)
    result = {"date": datetime.date.today().isoformat(), "hardware": _harness.cpu_name(), **measure(arguments.steps)}
    print(f"the host works {result['milliseconds_a_step']:.3f} ms between steps, of which 1 ms is a hundredth of a step of 100 ms")
    if arguments.save:
        _harness.save("overhead", result)
    return result


if __name__ == "__main__":
    _harness.run_as_script("overhead", main)
