"""What the host does between two steps: how long devices stand idle for it, and what the loop costs its own thread.

    blm bench overhead [--steps N] [--save]

A run of Stage II goes through the very loop of `blm train`, but each step is 100 ms of counting on the device that ends with what an
earlier one has made. What the run takes beyond the counting is time in which the device had nothing to do, while the host put batches
on it, fetched, wrote and showed numbers. Bound: 1 ms, a hundredth of a step. Batches are those of the first steps again: on a CPU,
workers that read would take the cores that stand for the device (`blm bench data` is about them).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import _harness
from _harness import Result

STEPS, SECONDS = 200, 0.1
COUNTERS = 2048  # so many at once that XLA takes the program for a dear one: what is cheap runs in the thread that asks for it
FIRST = 10  # steps that are not counted: workers start


class Counter:
    """A compiled step that, after its first call, counts on the device and answers what it answered then."""

    def __init__(self, step: Any):
        self.step, self.calls = step, 0

    def lower(self, *arguments: Any) -> Counter:
        self.step = self.step.lower(*arguments)
        return self

    def compile(self, options: Any) -> Counter:
        import jax

        def after(made: Any, before: Any, turns: Any) -> Any:
            counted = jax.lax.fori_loop(0, turns, lambda _, x: x * 0.999 + 1, before)
            return jax.lax.optimization_barrier((made, counted))

        self.step, self.counting = self.step.compile(options), jax.jit(after)
        return self

    def __call__(self, *arguments: Any) -> Any:
        import jax
        import jax.numpy as jnp

        if not self.calls:
            self.made = jax.block_until_ready(self.step(*arguments))
            self.before, self.turns = jnp.zeros(COUNTERS), 10_000
            for _ in range(3):
                self.turns = int(self.turns * SECONDS / self._bare(2))
            self.bare = [self.alone()]
        self.calls += 1
        if self.calls == FIRST:
            jax.block_until_ready(self.before)
            self.begun, self.own = time.perf_counter(), time.thread_time()
        made, self.before = self.counting(self.made, self.before, self.turns)
        return made

    def alone(self) -> float:
        return self._bare(60)

    def _bare(self, count: int) -> float:
        """Seconds of a step, given to the device one after the other without a loop between them."""
        import jax

        _, before = jax.block_until_ready(self.counting(self.made, self.before, self.turns))
        start = time.perf_counter()
        for _ in range(count):
            _, before = self.counting(self.made, before, self.turns)
        jax.block_until_ready(before)
        return (time.perf_counter() - start) / count


def measure(steps: int) -> Result:
    from blm_jax.recipe import CheckpointConfig, LogConfig
    from blm_jax.train import command, loop
    from blm_jax.train.outline import Outline

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.train.worlds import make_world

    made: list[Counter] = []
    taken: list[Any] = []
    found = {"putting": 0.0}
    whole, save, take, put = Outline.step, loop.save, loop.Loader.__next__, loop.meshes.put_rows

    def step(outline: Outline) -> Any:
        made.append(Counter(whole(outline)))
        return made[-1]

    def end(*_: Any) -> None:  # in place of a save: the state is that of another step
        found["end"], found["own_end"] = time.perf_counter(), time.thread_time()

    def take_again(loader: Any) -> Any:
        if loader.step < FIRST:
            taken.append(take(loader))
            return taken[-1]
        loader.close()
        return taken[-1]

    def put_counted(*arguments: Any) -> Any:
        start = time.thread_time()
        result = put(*arguments)
        if made and made[0].calls >= FIRST:
            found["putting"] += time.thread_time() - start
        return result

    @contextmanager
    def instead() -> Iterator[None]:
        Outline.step, loop.save = step, end  # type: ignore[method-assign]
        loop.Loader.__next__, loop.meshes.put_rows = take_again, put_counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            Outline.step, loop.save = whole, save  # type: ignore[method-assign]
            loop.Loader.__next__, loop.meshes.put_rows = take, put  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as folder, instead():
        world = make_world(Path(folder))
        run = world.stage_two(Path(folder) / "run", steps=steps, checkpoints=CheckpointConfig(every=10**9), log=LogConfig(every=10))
        command.train_run(replace(run, workers=0))
    count, [counter] = steps - FIRST + 1, made
    own, begun, ended = found["own_end"] - counter.own, counter.begun, found["end"]
    bare = [*counter.bare, counter.alone()]  # before the run, and after it
    return {
        "steps": count,
        "step_ms": [1e3 * seconds for seconds in bare],
        "idle_ms_a_step": 1e3 * ((ended - begun) / count - sum(bare) / 2),
        "bound_ms": 10 * SECONDS,
        "host_thread_ms_a_step": {
            "putting a batch on the device": 1e3 * found["putting"] / count,
            "all else": 1e3 * (own - found["putting"]) / count,
        },
    }


def main(argv: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="blm bench overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--save", action="store_true", help=f"write the result to {_harness.RESULTS.name}/")
    arguments = parser.parse_args(argv)
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": _harness.cpu_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax", "grain")},
        **measure(arguments.steps),
    }
    told = " and ".join(f"{one:.1f}" for one in result["step_ms"])
    idle, bound = result["idle_ms_a_step"], result["bound_ms"]
    print(f"beside steps of {told} ms the device stood idle for {idle:.2f} ms a step (bound: {bound:.0f})")
    for what, spent in result["host_thread_ms_a_step"].items():
        print(f"  of the host's thread, {what}: {spent:.2f} ms")
    if arguments.save:
        _harness.save("overhead", result)
    return result


if __name__ == "__main__":
    _harness.run_as_script("overhead", main)
