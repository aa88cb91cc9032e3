"""How a small base is made: how much each part of it learns from, and for how long. The package's own is of configs/world/base.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from blm_jax.errors import RequestError


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

    def check(self) -> None:
        for name, part in (("eyes", self.eyes), ("finding", self.finding), ("answering", self.answering)):
            if not (1 <= part.batch <= part.scenes and part.steps >= 1 and part.rate > 0):
                raise RequestError(f"{name}: {part} cannot be learned from: batch is from 1 to scenes, steps at least 1, rate above 0")
        if self.keep_finding < 0:
            raise RequestError(f"keep_finding: {self.keep_finding} is less than 0: it weighs losses")
