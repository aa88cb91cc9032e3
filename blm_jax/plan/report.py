"""One program on one topology: what it needs, whether it fits, how fast it can be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from blm_jax.plan import fits, program, roofline
from blm_jax.plan.topology import Topology

GIB = 1024**3


class Program(NamedTuple):
    """What is to be examined."""

    name: str
    lowered: jax.stages.Lowered
    mesh: Mesh
    needed: int  # operations of useful work, over all devices
    parameters: Any = None  # a tree of shapes with shardings, whose gradients are summed; None where there are none
    held: int = 0  # bytes that lie on each device before and after it runs: weights, optimizer state
    least: Mapping[str, int] = MappingProxyType({})  # bytes that a device must receive for weights and slopes, by axis
    notes: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True)
class Traffic:
    """Collectives of a kind, together."""

    kind: str
    dtypes: str
    over: tuple[str, ...]  # axes of the mesh
    between_slices: bool
    waits: bool  # nothing is computed meanwhile
    times: int
    bytes: int  # that a device receives
    seconds: float


@dataclass(frozen=True)
class Plan:
    program: str
    topology: str
    mesh: dict[str, int]
    fits: bool
    compile_seconds: float
    compile_cpu_seconds: float  # of all threads: what else runs on the machine adds nothing
    memory: dict[str, int]  # bytes of a chip: arguments, outputs, ... where it fits; held, used and available
    needed: int  # operations of useful work, over all chips
    operations: int = 0  # of one chip, as compiled
    products: dict[str, int] | None = None  # of these, by the dtype that is multiplied
    kernels: dict[str, int] | None = None  # of these, by Pallas kernel; those that no formula knows have 0
    collectives: tuple[Traffic, ...] = ()
    least: dict[str, int] | None = None  # bytes that a chip must receive for weights and slopes, by axis
    seconds: dict[str, float] | None = None
    mfu: dict[str, float] | None = None  # of the useful work, that the bounds allow
    bound_by: str = ""
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()  # changes with which it fits, where it does not

    @property
    def chips(self) -> int:
        total = 1
        for size in self.mesh.values():
            total *= size
        return total

    def received(self, axis: str) -> int:
        """Bytes that a chip receives along this axis alone."""
        return sum(one.bytes for one in self.collectives if one.over == (axis,))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "chips": self.chips}

    def with_remedies(self, remedies: tuple[str, ...]) -> Plan:
        return replace(self, remedies=remedies)


def examine(of: Program, topology: Topology, options: Mapping[str, str]) -> Plan:
    started, before = time.perf_counter(), time.process_time()
    compiled = fits.compile_for(of.lowered, options)
    known: dict[str, Any] = {
        "program": of.name,
        "topology": topology.name,
        "mesh": dict(of.mesh.shape),
        "compile_seconds": round(time.perf_counter() - started, 1),
        "compile_cpu_seconds": round(time.process_time() - before, 1),
        "needed": of.needed,
        "notes": of.notes,
    }
    if isinstance(compiled, fits.Overflow):
        return Plan(**known, fits=False, memory={"held": of.held, "used": compiled.needed, "available": compiled.available})
    memory = fits.memory_of(compiled)
    counts = program.count(str(compiled.as_text()), of.mesh)
    spent = roofline.times(counts, topology)
    peak = topology.pod.chip.tflops * 1e12 * of.mesh.size
    known["notes"] = (*of.notes, *_notes(counts))
    bounds = {"at_best": spent.at_best, "as_scheduled": spent.as_scheduled}
    return Plan(
        **known,
        fits=True,
        memory={**memory._asdict(), "held": of.held, "used": memory.used, "available": topology.pod.memory * GIB},
        operations=counts.operations,
        products=dict(counts.products),
        kernels=_kernels(counts),
        collectives=_together(counts, topology),
        least=dict(of.least),
        seconds={**spent._asdict(), **bounds},
        mfu={name: of.needed / (peak * bound) if bound else 0.0 for name, bound in bounds.items()},
        bound_by=spent.bound_by,
        faults=tuple(program.faults(counts, of.parameters)),
    )


def _kernels(counts: program.Counts) -> dict[str, int]:
    found: dict[str, int] = {}
    for kernel in counts.kernels:
        found[kernel.name] = found.get(kernel.name, 0) + (kernel.operations or 0) * kernel.times
    return found


def _together(counts: program.Counts, topology: Topology) -> tuple[Traffic, ...]:
    found: dict[Any, Traffic] = {}
    for one in counts.collectives:
        key = (one.kind, one.dtypes, one.groups.axes, one.groups.slices, one.waits)
        before = found.get(key, Traffic(*key, times=0, bytes=0, seconds=0.0))
        found[key] = replace(
            before,
            times=before.times + one.times,
            bytes=before.bytes + round(one.bytes * one.times),
            seconds=before.seconds + roofline.seconds(one, topology),
        )
    return tuple(sorted(found.values(), key=lambda one: -one.seconds))


def _notes(counts: program.Counts) -> tuple[str, ...]:
    notes = [f"loop {name}: data decides how often it turns; all numbers are of one turn" for name in counts.unknown]
    uncounted = sorted({kernel.name for kernel in counts.kernels if kernel.operations is None})
    notes += [f"kernel {name}: its operations are not counted" for name in uncounted]
    return tuple(notes)


# --- as text -------------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [f"{plan.program} on {plan.topology} ({mesh}), compiled in {plan.compile_seconds:.0f} s"]
    used, available = plan.memory["used"] / GIB, plan.memory["available"] / GIB
    if not plan.fits:
        lines.append(f"  does not fit: {used:.2f} GiB are needed, a chip has {available:.2f}")
        lines += [f"  would fit: {remedy}" for remedy in plan.remedies]
        return "\n".join(lines)
    kinds = ", ".join(f"{name} {plan.memory[name] / GIB:.2f}" for name in fits.Memory._fields)
    lines.append(f"  memory     {used:8.2f} of {available:.0f} GiB a chip ({kinds})")
    lines.append(f"  operations {plan.operations / 1e12:8.2f} T a chip, {plan.needed / plan.chips / 1e12:.2f} T of them needed")
    lines += _time_lines(plan)
    if plan.collectives:
        lines.append(f"  {'between chips':32}{'over':>14}{'times':>8}{'GB':>9}{'ms':>9}")
        lines += [_traffic_line(one) for one in plan.collectives]
        for axis, least in (plan.least or {}).items():
            lines.append(f"    {'weights and slopes at least':30}{axis:>14}{'':8}{least / 1e9:>9.3f}")
    lines += [f"  fault: {fault}" for fault in plan.faults]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def summary(plan: Plan, title: str) -> str:
    """A plan in a line, beside others."""
    used, available = plan.memory["used"] / GIB, plan.memory["available"] / GIB
    if not plan.seconds or not plan.mfu:
        return f"{title:44} {used:7.2f} GiB of {available:.2f}: does not fit"
    faults = f", {len(plan.faults)} faults" if plan.faults else ""
    best, scheduled = plan.seconds["at_best"] * 1e3, plan.seconds["as_scheduled"] * 1e3
    return f"{title:44} {used:7.2f} GiB, {scheduled:9.1f} ms as scheduled, {best:9.1f} at best, MFU {plan.mfu['as_scheduled']:.1%}{faults}"


def _time_lines(plan: Plan) -> list[str]:
    assert plan.seconds and plan.mfu
    parts = ", ".join(f"{name} {plan.seconds[name] * 1e3:.1f}" for name in roofline.Times._fields)
    best, scheduled = plan.seconds["at_best"] * 1e3, plan.seconds["as_scheduled"] * 1e3
    return [
        f"  time       {best:8.1f} ms at best, bound by {plan.bound_by}; {scheduled:.1f} as scheduled ({parts})",
        f"  MFU        {plan.mfu['at_best']:8.1%} at best, {plan.mfu['as_scheduled']:.1%} as scheduled",
    ]


def _traffic_line(one: Traffic) -> str:
    name = f"{one.kind} {one.dtypes}{' (waits)' if one.waits else ''}"
    over = "+".join(one.over) + (" slices" if one.between_slices else "")
    return f"    {name:30}{over:>14}{one.times:>8}{one.bytes / 1e9:>9.3f}{one.seconds * 1e3:>9.2f}"
