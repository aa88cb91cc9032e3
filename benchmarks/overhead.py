"""What the host does between two steps: how long devices stand idle, and what the loop costs its own thread.

    blm bench overhead [--steps N] [--save]

A run of Stage II from files goes through the very loop of `blm train`, but each step is a sleep of 100 ms on the device that
answers with what an earlier one has made. What the run takes beyond these sleeps is time in which the device had nothing to do,
though the host took batches from worker processes, put them on the device, fetched, wrote and showed numbers.
Bound: 1 ms, a hundredth of a step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import _harness
from _harness import Result

STEPS, SLEEP = 200, 0.1
FIRST = 10  # steps that are not counted: workers start


class Sleeper:
    """A compiled step that, after its first call, sleeps on the device and answers what it answered then."""

    def __init__(self, step: Any):
        self.step, self.calls = step, 0

    def lower(self, *arguments: Any) -> Sleeper:
        self.step = self.step.lower(*arguments)
        return self

    def compile(self, options: Any) -> Sleeper:
        import jax

        def sleep(before: Any) -> Any:
            time.sleep(SLEEP)
            return before

        def after(made: Any, before: Any) -> Any:
            slept = jax.pure_callback(sleep, jax.ShapeDtypeStruct(before.shape, before.dtype), before)
            return jax.lax.optimization_barrier((made, slept))

        self.step, self.asleep = self.step.compile(options), jax.jit(after)
        return self

    def __call__(self, *arguments: Any) -> Any:
        import jax
        import jax.numpy as jnp

        if not self.calls:
            self.made = jax.block_until_ready(self.step(*arguments))
            self.before = jnp.zeros(())
            self.bare = _seconds_a_sleep(self.asleep, self.made, self.before)
        self.calls += 1
        if self.calls == FIRST:
            jax.block_until_ready(self.before)
            self.begun, self.own = time.perf_counter(), time.thread_time()
        made, self.before = self.asleep(self.made, self.before)
        return made


def _seconds_a_sleep(asleep: Callable[..., Any], made: Any, before: Any, count: int = 20) -> float:
    """One after the other, given to the device without a loop between them."""
    import jax

    _, before = jax.block_until_ready(asleep(made, before))
    start = time.perf_counter()
    for _ in range(count):
        _, before = asleep(made, before)
    jax.block_until_ready(before)
    return (time.perf_counter() - start) / count


def measure(steps: int) -> Result:
    from blm_jax.recipe import CheckpointConfig, LogConfig
    from blm_jax.train import command, loop
    from blm_jax.train.outline import Outline

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.train.worlds import make_world

    made: list[Sleeper] = []
    found: dict[str, float] = {"taking": 0.0, "putting": 0.0}
    whole, save, take, put = Outline.step, loop.save, loop.Loader.__next__, loop.meshes.put_rows

    def step(outline: Outline) -> Any:
        made.append(Sleeper(whole(outline)))
        return made[-1]

    def end(*_: Any) -> None:  # in place of a save: the state is that of another step
        found["end"], found["own_end"] = time.perf_counter(), time.thread_time()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            if made and made[0].calls >= FIRST:
                found[name] += time.thread_time() - start
            return result

        return call

    @contextmanager
    def instead() -> Iterator[None]:
        Outline.step, loop.save = step, end  # type: ignore[method-assign]
        loop.Loader.__next__, loop.meshes.put_rows = counted("taking", take), counted("putting", put)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Outline.step, loop.save = whole, save  # type: ignore[method-assign]
            loop.Loader.__next__, loop.meshes.put_rows = take, put  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as folder, instead():
        world = make_world(Path(folder))
        run = world.stage_two(Path(folder) / "run", steps=steps, checkpoints=CheckpointConfig(every=10**9), log=LogConfig(every=10))
        command.train_run(replace(run, workers=1))
    count, [sleeper] = steps - FIRST + 1, made
    own = found["own_end"] - sleeper.own
    return {
        "steps": count,
        "step_ms": 1e3 * sleeper.bare,
        "idle_ms_a_step": 1e3 * ((found["end"] - sleeper.begun) / count - sleeper.bare),
        "bound_ms": 10 * SLEEP,
        "host_thread_ms_a_step": {
            "taking a batch": 1e3 * found["taking"] / count,
            "putting it on the device": 1e3 * found["putting"] / count,
            "the loop": 1e3 * (own - found["taking"] - found["putting"]) / count,
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
    idle, bound = result["idle_ms_a_step"], result["bound_ms"]
    print(f"beside steps of {result['step_ms']:.1f} ms the device stood idle for {idle:.2f} ms a step (bound: {bound:.0f})")
    for what, spent in result["host_thread_ms_a_step"].items():
        print(f"  of the host's thread, {what}: {spent:.2f} ms")
    if arguments.save:
        _harness.save("overhead", result)
    return result


if __name__ == "__main__":
    _harness.run_as_script("overhead", main)
