"""The training loop: state, step, loop, and nothing else. What it calls has a file of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import multihost

from blm_jax import mesh as meshes
from blm_jax.data.loader import Loader, Rows
from blm_jax.errors import RunError
from blm_jax.train.checkpoints import Checkpoints, fingerprint_tree
from blm_jax.train.goodput import Clock, Profile
from blm_jax.train.journal import Journal
from blm_jax.train.resume import check_same_data
from blm_jax.train.select import Tree, joined, split
from blm_jax.train.setup import Opened
from blm_jax.train.step import Report, State, begin, mean
from blm_jax.train.work import WorkCount, peak

COMPILE_MINUTES = 30  # between the first process that has compiled and the last

Evaluate = Callable[[State, Tree], dict[str, float]]


def train(opened: Opened, clock: Clock) -> dict[str, Any]:
    """Go on from the newest checkpoint to the last step, or to where the run is asked to stop."""
    found = opened.outline
    run, mesh = found.run, found.mesh
    settings = run.checkpoints
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(f"{run.out}/checkpoints", keep=settings.keep, best=settings.best or None, keep_every=settings.keep_every or None)
        )
        state, frozen = _restore(opened, checkpoints, clock)
        kept = fingerprint_tree(frozen)
        start = int(state.step)
        stack.enter_context(meshes.use(mesh))
        if start >= run.steps:
            return {"step": start, "stopped": False, "last": {}, "skipped": int(state.skipped), **clock.report()}
        rows = Batches(opened.rows, mesh, run.batch, start, run.workers)
        stack.callback(rows.close)
        with clock.time("data"):
            first = rows.next()
        with clock.time("compile"):
            step = found.step().lower(state, frozen, first.batch).compile(run.hardware.compiler_options or None)
            # All processes: sockets between CPUs wait half a minute for one that still compiles, and give up.
            multihost.get_barrier_sync_fn()(key="compiled", timeout_ms=COMPILE_MINUTES * 60_000)
        held_out = _evaluation(opened)
        work = work_count(opened)
        journal = stack.enter_context(
            Journal(
                run.out,
                begun=start,
                total=run.steps,
                every=run.log.every,
                clock=clock,
                kinds=found.kinds,
                peak=peak(mesh.devices.flat),
                wandb=run.log.wandb,
                config=asdict(run),
                process=jax.process_index(),
            )
        )
        profile = Profile(run.out, run.log.profile)
        stack.callback(profile.close)
        stopped = stack.enter_context(asked_to_stop())

        number, before = start, None
        while number < run.steps:
            profile.before(number)
            state, report = step(state, frozen, first.batch)
            report.in_a_row.copy_to_host_async()
            number += 1
            profile.after(number - 1, report)
            journal.log(number, values(report), work(first.host))
            _check_finite(before, number - 1, run.optimizer.skips)
            before = report
            stop = number < run.steps and stopped(number)
            done = number == run.steps or stop
            if not done:
                with clock.time("data"):
                    first = rows.next()  # while the devices are at work
            numbers: dict[str, float] = {}
            if held_out is not None and not stop and (done or (run.evaluation.every and number % run.evaluation.every == 0)):
                journal.flush()  # or the wait for the step would count as evaluation
                with clock.time("eval"):
                    numbers = held_out(state, frozen)
                    journal.tell(number, numbers)
            if done or number % settings.every == 0:
                journal.flush()
                _check_finite(report, number, run.optimizer.skips)
                with clock.time("save"):
                    save(checkpoints, opened, state, frozen, numbers)
                if jax.process_index() == 0:
                    clock.write(run.out, number)
            if stop:
                break
        with clock.time("save"):
            checkpoints.wait()
        journal.flush()
        if fingerprint_tree(frozen) != kept:
            raise RunError("what is frozen has changed: the run's weights are not to be trusted")
        if jax.process_index() == 0:
            clock.write(run.out, number)
        return {"step": number, "stopped": number < run.steps, "last": journal.last, "skipped": int(state.skipped), **clock.report()}


def values(report: Report) -> dict[str, Any]:
    """By the names that the journal gives them."""
    return {**report.told, "slope_norm": report.slope_norm, "skipped": report.skipped, "learning_rate": report.rate}


def save(checkpoints: Checkpoints, opened: Opened, state: State, frozen: Tree, numbers: dict[str, float]) -> None:
    step = int(state.step)
    data = {"step": step, "identity": opened.identity}
    checkpoints.save(step, _kept(state.params, frozen), rest_of(state), data, opened.assets, opened.provenance, numbers)


def _kept(trained: Tree, frozen: Tree) -> Tree:
    """What a checkpoint holds: of a policy all of it, even where only a robot's rows are trained."""
    return joined(trained, {"policy": frozen["policy"]}) if "policy" in frozen else trained


def rest_of(state: State) -> dict[str, Any]:
    """All of the state but the parameters."""
    rest = {name: part for name, part in state._asdict().items() if name != "params"}
    return {name: part for name, part in rest.items() if part is not None}


def _restore(opened: Opened, checkpoints: Checkpoints, clock: Clock) -> tuple[State, Tree]:
    found = opened.outline
    wanted = found.state()
    with clock.time("restore"):
        restored = checkpoints.restore(_kept(wanted.params, found.frozen), rest_of(wanted))
        if restored is None:
            trained, frozen, slow = opened.load()
            return begin(trained, slow, found.optimizer, found.mesh), frozen
        check_same_data(restored.data.get("identity"), opened.identity, found.run.out)
        params, held = split(restored.params, found.rate_of)
        rest = jax.tree.unflatten(jax.tree.structure(rest_of(wanted)), jax.tree.leaves(restored.state))
        return State(**{"slow": None, **rest, "params": params}), {**held, **opened.load_frozen()}


def _check_finite(report: Report | None, number: int, limit: int) -> None:
    if report is not None and int(report.in_a_row) >= limit:
        raise RunError(
            f"the last {limit} steps, up to {number}, were not finite: the run stops. Its last checkpoint is from before them, "
            "or has skipped them; try a lower optimizer.rate"
        )


def work_count(opened: Opened) -> WorkCount:
    found, run = opened.outline, opened.outline.run
    lora = run.stage_one.lora if run.stage_one is not None else None
    ranks = {} if lora is None else {f"decoder.blocks.{name}": lora.rank for name in lora.targets}
    own = len(meshes.rows_of_process(found.mesh, run.batch))
    trained = [name for name, rate in found.rate_of.items() if rate > 0]
    return WorkCount(found.backbone, found.policy, trained=trained, ranks=ranks, remat=run.hardware.compute.remat, parts=run.batch // own)


# --- batches -----------------------------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """A batch on the host and on its devices."""

    host: Any
    batch: Any


class Batches:
    """Of this process's rows, put on its devices."""

    def __init__(self, rows: Rows[Any], mesh: Mesh, count: int, start: int = 0, workers: int = 0):
        self.mesh, self.count = mesh, count
        self.own = meshes.rows_of_process(mesh, count)
        self.loader: Loader[Any] = Loader(rows, start=start, own=self.own, workers=workers)

    def next(self) -> Ready:
        host = next(self.loader)
        return Ready(host, meshes.put_rows(host, self.mesh, self.own, self.count))

    def close(self) -> None:
        self.loader.close()


def _evaluation(opened: Opened) -> Evaluate | None:
    """Of what is held out, the same batches each time."""
    if opened.held_out is None:
        return None
    found, held_out = opened.outline, opened.held_out
    compiled = found.evaluation()

    def evaluate(state: State, frozen: Tree) -> dict[str, float]:
        batches = Batches(held_out, found.mesh, found.run.batch)
        try:
            told = [jax.device_get(compiled(state, frozen, batches.next().batch)) for _ in range(found.run.evaluation.batches)]
        finally:
            batches.close()
        sums = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *told)
        return {f"held_out/{name}": float(mean(share)) for name, share in sums.items() if np.ndim(share.sum) == 0}

    return evaluate


# --- being stopped -----------------------------------------------------------------------------------------------------------


@contextmanager
def asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """Whether the run shall end after this step: all processes of it hear the same answer at the same step."""
    if jax.process_count() > 1:
        yield lambda step: multihost_utils.reached_preemption_sync_point(step)  # JAX catches the signal and tells the others
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
