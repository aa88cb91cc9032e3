"""How a small base is made: how much each part of it learns from, and for how long. The package's own is of configs/world/base.yaml."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    scenes: int  # that it learns from
    batch: int  # of these, a step
    steps: int
    rate: float


@dataclass(frozen=True)
class Recipe:
    eyes: Part
    finding: Part
    answering: Part
    keep_finding: float  # how much finding's losses weigh beside that of answers
