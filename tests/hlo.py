"""Counting in compiled programs."""

from __future__ import annotations

import math
import re

import jax

_DEFINITION = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r"%[\w.-]+ = \w+\[([\d,]*)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?(%[\w.-]+), .*?lhs_contracting_dims=\{([\d,]*)\}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def dot_flops(compiled: jax.stages.Compiled) -> int:
    """Operations of all matrix products of a compiled program, for one device; a loop's body counts once."""
    program = str(compiled.as_text())
    shapes = {name: _numbers(shape) for name, shape in _DEFINITION.findall(program)}
    total = 0
    for shape, left, contracted in _DOT.findall(program):
        total += 2 * math.prod(_numbers(shape)) * math.prod(shapes[left][axis] for axis in _numbers(contracted))
    return total
