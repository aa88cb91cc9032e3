"""`blm plan`: a run's programs, compiled for chips that are not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.config import BackboneConfig, Experiment, HardwareConfig, MeshConfig
from blm_jax.configfile import load, load_as, override
from blm_jax.errors import RequestError
from blm_jax.plan.answering import generation
from blm_jax.plan.fits import Overflow, compile_for, memory_of
from blm_jax.plan.programs import backbone_of, sampling, training
from blm_jax.plan.report import GIB, Plan, Program, examine, summary, table
from blm_jax.plan.topology import Topology, describe
from blm_jax.recipe import Run

Which = Literal["train", "sampling", "generation", "all"]


def read_plan(files: Sequence[str], overrides: Sequence[str]) -> Run | Experiment:
    """A run, or a model alone, which can only answer."""
    try:
        return load_as(Run, *files, overrides=overrides)
    except RequestError as no_run:
        try:
            return load(*files, overrides=overrides)
        except RequestError:
            raise no_run from None


def plan_run(
    of: Run | Experiment, name: str, *, which: Which = "all", rows: int | None = None, sweep: bool = False, remedy: bool = True
) -> dict[str, Any]:
    """What `blm plan --json` prints, and as `text` what it prints without; `no` is said where something does not fit."""
    topology = describe(name)
    if sweep:
        return _sweep(of, topology)
    mesh = mesh_for(of, which, topology)
    plans = []
    for program in _programs(of, mesh, which, rows):
        _tell(f"{program.name} on {topology.name}: compiling, which takes minutes")
        found = examine(program, topology, of.hardware.compiler_options)
        if remedy and not found.fits and isinstance(of, Run) and program.parameters is not None:
            found = found.with_remedies(tuple(remedies(of, topology, program, found)))
        plans.append(found)
    return {
        "topology": topology.name,
        "fits": all(found.fits for found in plans),
        "programs": [found.to_json() for found in plans],
        "text": "\n".join(map(table, plans)),
        "no": "; ".join(_no(found) for found in plans if not found.fits),
    }


def _no(found: Plan) -> str:
    needed, available = (found.memory[name] / GIB for name in ("used", "available"))
    return f"{found.program} does not fit on {found.topology}: it needs {needed:.2f} GiB of each chip's {available:.2f}"


def mesh_for(of: Run | Experiment, which: Which, topology: Topology) -> Mesh:
    """As asked for; else, where nothing is trained, that of serving."""
    asked, serves = of.hardware.mesh, which in ("sampling", "generation") or isinstance(of, Experiment)
    if serves and asked == MeshConfig():
        asked = meshes.serving(_backbone(of), len(topology.devices))
    return meshes.make_mesh(asked, topology.devices)


def _programs(of: Run | Experiment, mesh: Mesh, which: Which, rows: int | None) -> Iterator[Program]:
    """Lowered one by one: each takes a while."""
    if isinstance(of, Experiment) and which not in ("all", "generation"):
        raise RequestError(f"--program {which}: the config has no stage_one or stage_two, and is planned for generation alone")
    if rows is not None and (which == "train" or (which == "all" and isinstance(of, Run) and of.stage_two is None)):
        raise RequestError("--rows is how many are answered or acted on at once: a step's rows are batch=")
    if isinstance(of, Run) and which in ("train", "all"):
        _tell("lowering the step")
        yield training(of, mesh)
    if isinstance(of, Run) and (which == "sampling" or (which == "all" and of.stage_two is not None)):
        _tell("lowering what acts")
        yield sampling(of, mesh, observations=rows)
    if isinstance(of, Experiment) or which == "generation":
        _tell("lowering what answers")
        yield from generation(of if isinstance(of, Experiment) else Experiment(_backbone(of), of.hardware), mesh, prompts=rows)


def _backbone(of: Run | Experiment) -> BackboneConfig:
    return of.model if isinstance(of, Experiment) else backbone_of(of)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- which hardware --------------------------------------------------------------------------------------------------------


def _sweep(of: Run | Experiment, topology: Topology) -> dict[str, Any]:
    """The step on each mesh that divides the chips, with and without remat: a line each, the fastest that fits first."""
    if not isinstance(of, Run):
        raise RequestError("--sweep is of training: the config has no stage_one or stage_two")
    found = []
    for hardware in candidates(of, topology):
        mesh = meshes.make_mesh(hardware.mesh, topology.devices)
        _tell(f"{topology.name} {_written(hardware)}: compiling")
        found.append((hardware, examine(training(replace(of, hardware=hardware), mesh), topology, hardware.compiler_options)))
    found.sort(key=lambda one: one[1].seconds["as_scheduled"] if one[1].seconds else float("inf"))
    return {
        "topology": topology.name,
        "fits": any(plan.fits for _, plan in found),
        "programs": [plan.to_json() | {"hardware": _written(hardware)} for hardware, plan in found],
        "text": "\n".join(summary(plan, _written(hardware)) for hardware, plan in found),
        "no": "" if any(plan.fits for _, plan in found) else f"nothing that was tried fits on {topology.name}",
    }


def candidates(of: Run, topology: Topology) -> Iterator[HardwareConfig]:
    """Each way to share chips between copies and shards that the batch divides over; heads stay divided as they are."""
    asked = of.hardware
    tensor = meshes.tensor_parts(meshes.make_mesh(asked.mesh, topology.devices))
    chips = len(topology.devices) // tensor
    if of.batch % chips:
        raise RequestError(f"batch is {of.batch}: it must be a multiple of the {chips} devices that have rows of their own (data x fsdp)")
    for shards in (size for size in range(1, chips + 1) if chips % size == 0 and chips // size % topology.slices == 0):
        for remat in ("none", "dots", "full"):
            yield replace(asked, mesh=MeshConfig(chips // shards, shards, tensor), compute=replace(asked.compute, remat=remat))


def _written(hardware: HardwareConfig) -> str:
    mesh = hardware.mesh
    return f"data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor} remat={hardware.compute.remat}"


# --- what to do where it does not fit ----------------------------------------------------------------------------------------


def remedies(run: Run, topology: Topology, program: Program, found: Plan) -> Iterator[str]:
    """What makes the step fit, as one would write it: the first change that does alone, or all together; each was compiled."""
    options = changes(run, program.mesh, topology.slices)
    tries = [*options, [change for option in options for change in option]]
    for option in tries if len(options) > 1 else options:
        _tell(f"it does not fit; with {' '.join(option)}?")
        used = _used(override(run, option), topology)
        if used is not None:
            yield f"with {' '.join(option)}: {used / GIB:.2f} GiB"
            return
    available = found.memory["available"]
    fewest = program.held / available * program.mesh.size
    yield (
        f"on more chips than {program.mesh.size}: weights and optimizer state take {program.held / GIB:.2f} GiB of each of them, and "
        f"would fill {fewest:.1f} chips if mesh.fsdp divided them over all"
    )


def changes(run: Run, mesh: Mesh, slices: int) -> list[list[str]]:
    """Overrides with which a run learns the same in less memory, the dearest last."""
    found = []
    if run.hardware.compute.remat != "full":
        found.append(["hardware.compute.remat=full"])
    if run.hardware.rows_at_once != 1 and run.batch > meshes.batch_shards(mesh):
        found.append(["hardware.rows_at_once=1"])
    copies, shards = tuple(mesh.devices.shape)[:2]
    if copies % (2 * slices) == 0:
        found.append([f"hardware.mesh.data={copies // 2}", f"hardware.mesh.fsdp={2 * shards}"])
    if run.optimizer.moments == "float32":
        found.append(["optimizer.moments=int8"])
    return found


def _used(run: Run, topology: Topology) -> int | None:
    """Of a chip's memory; None where it does not fit either."""
    program = training(run, meshes.make_mesh(run.hardware.mesh, topology.devices))
    compiled = compile_for(program.lowered, run.hardware.compiler_options)
    return None if isinstance(compiled, Overflow) else memory_of(compiled).used
