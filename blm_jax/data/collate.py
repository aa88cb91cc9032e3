"""Examples to a batch: the last step on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blm_jax.batch import Batch
from blm_jax.config import BackboneConfig
from blm_jax.data.prompt import Example
from blm_jax.data.vision.windows import Layout, Levels, fill_rows, lay_out, lay_out_groups
from blm_jax.errors import RequestError


def collate(
    rows: Sequence[Sequence[Example]],
    config: BackboneConfig,
    *,
    length: int | None = None,
    row_multiple: int = 1,
    vision_row_length: int | None = None,
    vision_rows_per_group: int = 1,
    levels: Levels | None = None,
) -> Batch:
    """A batch whose row i holds the examples rows[i], one after the other, padded on the right to `length` (the longest row).

    Without `vision_row_length` all pictures share rows of the best shape, their number a multiple of `row_multiple`. With it,
    the shape is fixed, and the pictures of each text row lie in vision rows of its own. With `levels`, pictures stay bytes.
    """
    longest = max((sum(len(example.tokens) for example in row) for row in rows), default=0)
    length = longest if length is None else length
    if longest > length:
        raise RequestError(f"a row of {longest} tokens does not fit a length of {length}: make rows longer, or examples shorter")
    shape = (len(rows), length)
    tokens = np.full(shape, config.tokens.pad, np.int32)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros((len(rows), 3, length), np.int32)
    slots = np.full(shape, -1, np.int32)
    targets = np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            end = start + len(example.tokens)
            tokens[i, start:end] = example.tokens
            segments[i, start:end] = number
            positions[i, :, start:end] = example.positions
            # The last token of an example predicts nothing.
            targets[i, start : end - 1] = example.tokens[1:]
            weights[i, start : end - 1] = example.supervised[1:]
            start = end
    layout = lay_out_pictures(rows, config, row_multiple, vision_row_length, vision_rows_per_group)
    if layout is None:
        return Batch(tokens, segments, positions, slots, targets, weights)
    fill_slots(slots, tokens, rows, layout, config)
    pictures = [picture for row in rows for example in row for picture in example.pictures]
    frames = [frame for picture in pictures for frame in picture.frames(as_bytes=levels is not None)]
    return Batch(tokens, segments, positions, slots, targets, weights, fill_rows(layout, frames, config.vision, levels))


def lay_out_pictures(
    rows: Sequence[Sequence[Example]], config: BackboneConfig, row_multiple: int, row_length: int | None, rows_per_group: int
) -> Layout | None:
    """The layout of all frames in the order of their tokens."""
    sizes: list[list[tuple[int, int]]] = [[] for _ in rows]
    for i, row in enumerate(rows):
        for grid in (picture.grid for example in row for picture in example.pictures):
            sizes[i] += [(grid.rows, grid.columns)] * grid.frames
    if row_length is not None:
        return lay_out_groups(sizes, config.vision, row_length=row_length, rows_per_group=rows_per_group)
    flat = [size for row in sizes for size in row]
    return lay_out(flat, config.vision, row_multiple) if flat else None


def fill_slots(slots: np.ndarray, tokens: np.ndarray, rows: Sequence[Sequence[Example]], layout: Layout, config: BackboneConfig) -> None:
    """Write to each placeholder where its visual token is, counted within the vision rows of the text row's group."""
    per_group = layout.rows * layout.row_length // config.vision.merge**2 // layout.groups
    frame = 0
    for i, row in enumerate(rows):
        count = sum(picture.grid.frames for example in row for picture in example.pictures)
        cells = np.concatenate([np.zeros(0, int), *layout.cells[frame : frame + count]])
        frame += count
        visual = np.isin(tokens[i], (config.tokens.image, config.tokens.video))
        group = i * layout.groups // len(rows)
        slots[i, visual] = cells - group * per_group
