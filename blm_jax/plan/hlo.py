"""The text of a compiled program, read: its instructions, and how often each of them runs.

A scan's body is written once and runs many times. On CPU the compiler says how many (`known_trip_count`); on TPU it does not, so
loops are stepped through: all that decides when one ends is arithmetic of a few scalars, in its condition, its body and its first state.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_BEGIN = re.compile(r"(ENTRY )?(%[\w.-]+) \(.*\{$")
_DEFINE = re.compile(r"\s+(ROOT )?(%[\w.-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_NAME = re.compile(r"%[\w.-]+")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)")
_MOST_TRIPS = 1 << 16  # that are stepped through; no loop of a model is as long


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # of memory: 0 is HBM, others are on the chip

    @property
    def bytes(self) -> int:
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)  # bf16, s32, f8e4m3fn; token and opaque have no size
    return int(found[1]) if found else 0


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, a tuple's one after the other
    operands: tuple[str, ...]
    inside: str  # between the parentheses, as it stands
    rest: str  # behind them

    def attribute(self, name: str) -> str | None:
        """A short one, such as `dim_labels`: up to the next comma that is in no braces."""
        found = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|[^,\s]+)", self.rest)
        return found[1] if found else None

    @property
    def called(self) -> tuple[str, ...]:
        return tuple(name for found in _CALLED.findall(self.rest) for name in _NAME.findall(found))

    @property
    def origin(self) -> str:
        """Where it comes from in the Python program."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def shapes_of(self, operand: str) -> tuple[Shape, ...]:
        return self.instructions[operand].shapes


class Visit(NamedTuple):
    """An instruction where it runs."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool  # inside a kernel: what it reads and writes is no memory traffic of its own
    region: int  # number of the loop's body, or call, that it belongs to


Value = Any  # an integer, a tuple of values, or None where it is not known


class Module:
    def __init__(self, text: str) -> None:
        self.computations, self.entry = _parse(text)
        self.unknown: list[str] = []  # loops whose number of turns is decided while they run: counted as one turn
        self._trips: dict[tuple[str, str], int | None] = {}

    def visits(self) -> Iterator[Visit]:
        """Every instruction that runs, fusions' own included; what a reduction applies to scalars is left out."""
        yield from self._walk(self.entry, 1, (), False, itertools.count())

    def _walk(
        self, name: str, times: int, given: Sequence[Value], fused: bool, regions: Iterator[int], region: int = -1
    ) -> Iterator[Visit]:
        computation = self.computations[name]
        region = next(regions) if not fused else region
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, fused, region)
            opcode = instruction.opcode
            if opcode == "while":
                state = self._evaluate(computation, instruction.operands[0], given, {})
                turns = self._turns(instruction, computation, state)
                yield from self._walk(_named(instruction, "body"), times * turns, (state,), False, regions)
            elif opcode == "fusion":
                for called in instruction.called:
                    yield from self._walk(called, times, (), True, regions, region)
            elif opcode in ("call", "conditional", "async-start", "custom-call"):  # of a conditional every branch: an upper bound
                values = tuple(self._evaluate(computation, operand, given, {}) for operand in instruction.operands)
                for called in instruction.called:
                    yield from self._walk(called, times, values if opcode in ("call", "async-start") else (), fused, regions, region)

    def _turns(self, loop: Instruction, computation: Computation, state: Value) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        key = (computation.name, loop.name)
        if key not in self._trips:
            self._trips[key] = self._step_through(_named(loop, "condition"), _named(loop, "body"), state)
            if self._trips[key] is None:
                self.unknown.append(loop.origin or loop.name)
        turns = self._trips[key]
        return 1 if turns is None else turns

    def _step_through(self, condition: str, body: str, state: Value) -> int | None:
        decide, move = self.computations[condition], self.computations[body]
        for turns in range(_MOST_TRIPS):
            goes_on = self._evaluate(decide, decide.root.name, (state,), {})
            if not goes_on:
                return None if goes_on is None else turns
            state = self._evaluate(move, move.root.name, (state,), {})
        return None

    def _evaluate(self, computation: Computation, name: str, given: Sequence[Value], done: dict[str, Value]) -> Value:
        """What is known of a value before the program runs."""
        if name not in done:
            done[name] = self._compute(computation, computation.instructions[name], given, done)
        return done[name]

    def _compute(self, computation: Computation, of: Instruction, given: Sequence[Value], done: dict[str, Value]) -> Value:
        def operand(number: int) -> Value:
            return self._evaluate(computation, of.operands[number], given, done)

        match of.opcode:
            case "constant":
                return _literal(of)
            case "parameter":
                number = int(of.inside)
                return given[number] if number < len(given) else None
            case "tuple":
                scalars = [any(not shape.dims for shape in computation.shapes_of(name)) for name in of.operands]
                return tuple(operand(number) if scalar else None for number, scalar in enumerate(scalars))
            case "get-tuple-element":
                whole = operand(0)
                return whole[int(of.attribute("index") or 0)] if isinstance(whole, tuple) else None
            case "copy" | "bitcast" | "convert" | "reshape" | "copy-done" | "opt-barrier" | "optimization-barrier":
                return operand(0)
            case "copy-start":
                return operand(0)  # its `done` asks for nothing else
            case "fusion" | "call":
                called = self.computations[of.called[0]]
                if called.root.opcode not in _KNOWN:
                    return None
                return self._evaluate(called, called.root.name, [operand(number) for number in range(len(of.operands))], {})
            case "select":
                chosen = operand(0)
                return None if chosen is None else operand(1 if chosen else 2)
            case "compare":
                function = _COMPARE[of.attribute("direction") or ""]
            case opcode if opcode in _ARITHMETIC:
                function = _ARITHMETIC[opcode]
            case _:
                return None
        left, right = operand(0), operand(1)
        return function(left, right) if isinstance(left, int) and isinstance(right, int) else None


_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
# What `_compute` knows as a computation's last instruction.
_KNOWN = {
    *_ARITHMETIC,
    *("constant", "parameter", "tuple", "get-tuple-element", "select", "compare"),
    *("copy", "bitcast", "convert", "reshape", "fusion", "call"),
}


def _literal(of: Instruction) -> int | None:
    if of.inside in ("true", "false"):
        return int(of.inside == "true")
    return int(of.inside) if re.fullmatch(r"-?\d+", of.inside) and of.shapes[0].dtype[0] in "su" else None


def _named(of: Instruction, attribute: str) -> str:
    name = of.attribute(attribute)
    if name is None:
        raise ValueError(f"{of.name} has no {attribute}")
    return name


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    lines: list[str] = []  # of the computation that is being read: an attribute may hold line breaks
    for line in text.splitlines():
        begins = None if name else _BEGIN.match(line)
        if begins:
            name, lines, root = begins[2], [], ""
            entry = name if begins[1] else entry
        elif name and line == "}":
            instructions = {found.name: found for found in map(_instruction, lines)}
            computations[name] = Computation(name, instructions, instructions[root])
            name = ""
        elif name:
            defined = _DEFINE.match(line)
            if defined:
                root = defined[2] if defined[1] else root
                lines.append(line)
            elif lines:
                lines[-1] += line
    return computations, entry


def _instruction(line: str) -> Instruction:
    found = _DEFINE.match(line)
    assert found
    begin = found.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"no instruction: {line[:200]}")
    close = _closing(line, opcode.end() - 1)
    shapes = tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), _space(layout))
        for dtype, dims, layout in _SHAPE.findall(line[begin:end])
    )
    inside = line[opcode.end() : close - 1]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(found[2], opcode[1], shapes, operands, inside, line[close:])


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _closing(line: str, begin: int) -> int:
    """Just behind the parenthesis that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"a parenthesis is not closed: {line[:200]}")
