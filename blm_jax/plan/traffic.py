"""Bytes between a chip and its memory, estimated from the compiled program: what each kernel reads and writes.

An estimate and no bound: buffers that the compiler keeps on the chip are left out, a slice counts as the slice, an update in place as
what it writes, but what a kernel reads twice counts once.
"""

from __future__ import annotations

from blm_jax.plan.hlo import Computation, Instruction, Module

# They name, group or await values, or are counted by what they call.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all", "partition-id"),
    *("replica-id", "opt-barrier", "optimization-barrier", "async-start", "async-update", "async-done", "copy-done", "send-done"),
    *("recv-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "reduce-scatter-done", "iota", "broadcast"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


def moved(of: Instruction, computation: Computation, module: Module) -> int:
    if of.opcode in _FREE:
        return 0
    operands = [(name, _bytes(computation.instructions[name])) for name in of.operands]
    if of.opcode == "fusion":
        inner = module.computations[of.called[0]]
        read = sum(min(size, _read(inner, number, module)) for number, (_, size) in enumerate(operands))
        return read + _written(of, inner)
    if of.opcode in _SLICES:
        return 2 * _bytes(of)
    if of.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operands[1 if of.opcode == "dynamic-update-slice" else -1][1]
    if of.opcode == "copy-start":
        return operands[0][1] + (of.shapes[0].bytes if of.shapes[0].space == 0 else 0)
    return sum(size for _, size in operands) + _bytes(of)


def _bytes(of: Instruction) -> int:
    return sum(shape.bytes for shape in of.shapes if shape.space == 0)


def _read(computation: Computation, number: int, module: Module) -> int:
    """Of a kernel's parameter, by those that use it."""
    parameter = next((i for i in computation.instructions.values() if i.opcode == "parameter" and int(i.inside) == number), None)
    return 0 if parameter is None else _used(computation, parameter, module)


def _used(computation: Computation, value: Instruction, module: Module) -> int:
    total, whole = 0, sum(shape.bytes for shape in value.shapes)
    for user in computation.instructions.values():
        if value.name not in user.operands:
            continue
        if user.opcode == "tuple":
            continue  # handed on as it is
        if user.opcode in _SLICES:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "bitcast":
            total += _used(computation, user, module)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # written in place
        elif user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            total += sum(_read(inner, number, module) for number, name in enumerate(user.operands) if name == value.name)
        else:
            return whole
    return min(total, whole)


def _written(of: Instruction, inner: Computation) -> int:
    """A kernel's results: what it hands on is not written, and an update in place writes the update."""
    results = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    total = 0
    for name, shape in zip(results, of.shapes, strict=False):
        made = inner.instructions[name]
        while made.opcode == "bitcast":
            made = inner.instructions[made.operands[0]]
        if shape.space or made.opcode == "parameter":
            continue
        update = made.opcode == "dynamic-update-slice"
        total += sum(part.bytes for part in inner.instructions[made.operands[1]].shapes) if update else shape.bytes
    return total
