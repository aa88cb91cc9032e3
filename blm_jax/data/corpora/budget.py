"""How much vision work a record is, and how much of it a sequence holds.

Sequences have fixed shapes: `tokens` for text, one row of patches for their pictures. Where windows share slots, the length
that pictures need is not the sum of what each needs alone. A record is therefore charged by a sum that bounds it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from blm_jax.config import VisionConfig
from blm_jax.data.vision.windows import Size, check_size, cut_frame, window_side
from blm_jax.errors import RequestError

LARGEST = 2**24  # of a budget: what packing computes with stays within 64 bits


@dataclass(frozen=True)
class Budget:
    """The most that a sequence holds."""

    tokens: int
    patches: int = 0  # by `vision_work`

    def __post_init__(self) -> None:
        if not (1 <= self.tokens < LARGEST and 0 <= self.patches < LARGEST):
            raise RequestError(
                f"a sequence of {self.tokens} tokens and {self.patches} patches: at least 1 and 0, at most {LARGEST - 1} each"
            )


def vision_work(frames: Iterable[Size], config: VisionConfig) -> int:
    """What the frames of a record are charged, in patches of a vision row.

    A full window costs its slot. Of partial ones, slots are charged as if each size had slots of its own: a row needs no more
    than that and `margin`, whatever it holds. For photographs this is 3 % more than they are, 2 % more than they would need.
    """
    slots = sum((_charge(*check_size(frame, config), config) for frame in frames), Fraction(0))
    return math.ceil(slots * config.window_patches)


def all_whole(frames: Iterable[Size], config: VisionConfig) -> bool:
    """Whether the frames are cut into full windows alone, each of which has its slot: then rows need no margin."""
    capacity = window_side(config) ** 2
    return all((cut_frame(*check_size(frame, config), config).sizes == capacity).all() for frame in set(frames))


@functools.lru_cache(maxsize=4096)
def _charge(rows: int, columns: int, config: VisionConfig) -> Fraction:
    capacity = window_side(config) ** 2
    sizes, counts = np.unique(cut_frame(rows, columns, config).sizes, return_counts=True)
    return sum((Fraction(count, capacity // size) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)), Fraction(0))


@functools.lru_cache(maxsize=16)
def margin(config: VisionConfig, whole: bool = False) -> Fraction:
    """Slots that a row may need beyond what its records are charged: none if all windows are `whole`.

    Windows are laid into slots by size, the largest first, and a slot is opened where no open one has room (`windows.pack`).
    Let `last` be the size that opens the last one. Charged less than a slot are only slots in which fewer windows of the size
    that opened them lie than could: k - 1 windows of a size are lacking at most, so 1 - 1/k of a slot is, and as `last` found no
    room in any, each slot that lacks some is charged all but (last - 1) / capacity.
    """
    if whole:
        return Fraction(0)
    side = window_side(config)
    capacity = side**2
    sizes = {height * width for height in range(1, side + 1) for width in range(1, side + 1)}
    fit = {size: capacity // size for size in sizes}

    def lacking(last: int) -> Fraction:
        larger = [fit[size] - 1 for size in sizes if size > last]  # windows that may lack in slots of each size
        return sum(
            (min(Fraction(few, few + 1), Fraction(few * (last - 1), capacity)) for few in larger), Fraction(fit[last] - 1, fit[last])
        )

    return max(map(lacking, sizes))


def row_budget(row_length: int, config: VisionConfig, whole: bool = False) -> int:
    """How much vision work a vision row of this many patches is sure to hold."""
    budget = row_length - math.ceil(margin(config, whole) * config.window_patches)
    if row_length % config.window_patches or budget < 1:
        least = math.ceil(margin(config, whole) + 1) * config.window_patches
        raise RequestError(f"a vision row of {row_length} patches: it must be a multiple of {config.window_patches}, from {least} on")
    return budget


def least_row(work: int, config: VisionConfig, whole: bool = False) -> int:
    """Patches of the shortest vision row whose budget is `work`."""
    return math.ceil(Fraction(work, config.window_patches) + margin(config, whole)) * config.window_patches
