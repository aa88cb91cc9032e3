"""Positions for the rotary embedding: time, height and width of every token (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blm_jax.config import BackboneConfig
from blm_jax.errors import RequestError


@dataclass(frozen=True)
class Grid:
    """The shape of a picture or a video in patches."""

    frames: int  # temporal patches: 1 for a picture
    rows: int
    columns: int
    seconds: float | None = None  # between two frames of a video; None for a picture

    @property
    def patches(self) -> int:
        return self.frames * self.rows * self.columns

    def visual_tokens(self, merge: int) -> int:
        return self.patches // merge**2


def rope_positions(tokens: np.ndarray, grids: Sequence[Grid], config: BackboneConfig) -> np.ndarray:
    """Positions [3, n] of one example. What comes after it, a generated token say, stands at their maximum + 1.

    `grids` belong to the pictures and videos in the order in which their tokens come.
    """
    tokens = np.asarray(tokens)
    merge = config.vision.merge
    visual = np.isin(tokens, (config.tokens.image, config.tokens.video))
    positions = np.empty((3, len(tokens)), np.int32)
    place = start = 0  # of the next token in the sequence; of its position
    for grid in grids:
        first = place + int(np.argmax(visual[place:])) if visual[place:].any() else len(tokens)
        last = first + grid.visual_tokens(merge)
        expected = config.tokens.image if grid.seconds is None else config.tokens.video
        if last > len(tokens) or (tokens[first:last] != expected).any():
            raise RequestError(f"the tokens from {first} on are not the {last - first} placeholders of a picture or video of {grid}")
        positions[:, place:first] = np.arange(start, start + first - place)
        start += first - place
        positions[:, first:last] = start + grid_positions(grid, config)
        # Text goes on past everything before it. Release 5.23 of transformers lets it overlap the time axis of a long video.
        if config.video_positions == "transformers-5.23":
            start += max(grid.rows, grid.columns) // merge
        else:
            start = int(positions[:, first:last].max()) + 1
        place = last
    if visual[place:].any():
        raise RequestError(f"{int(visual[place:].sum())} placeholder tokens have no picture or video")
    positions[:, place:] = np.arange(start, start + len(tokens) - place)
    return positions


def grid_positions(grid: Grid, config: BackboneConfig) -> np.ndarray:
    """Positions [3, visual tokens] relative to the first token of a picture or video."""
    merge = config.vision.merge
    time = frame_times(grid, config)
    axes = np.meshgrid(time, np.arange(grid.rows // merge), np.arange(grid.columns // merge), indexing="ij")
    return np.stack(axes).reshape(3, -1).astype(np.int32)


def frame_times(grid: Grid, config: BackboneConfig) -> np.ndarray:
    """Positions [frames] on the time axis, whole numbers."""
    if grid.seconds is None:
        return np.arange(grid.frames)
    if config.video_positions == "transformers-4.57":
        return np.arange(grid.frames) * int(grid.seconds) * config.vision.tokens_per_second
    # In float32, as the reference: 30 frames a second are no whole number of seconds, and rounding decides at the edges.
    step = np.float32(config.vision.tokens_per_second) * np.float32(grid.seconds)
    return (np.arange(grid.frames, dtype=np.float32) * step).astype(np.int64)
