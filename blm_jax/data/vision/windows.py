"""Where every patch lies: frames cut into attention windows and packed into rows of equal length.

A cell is what becomes one visual token: merge x merge patches, which lie together. A slot holds one full window, or several
partial ones (those at the right and lower edge of a frame). A frame never leaves its row.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blm_jax.batch import VisionRows
from blm_jax.config import VisionConfig
from blm_jax.errors import RequestError

Levels = tuple[tuple[float, float], ...]  # see `VisionRows`
Size = tuple[int, int]  # rows and columns of a frame in patches

# Few shapes, so that few programs are compiled: lengths of rows in slots, and numbers of rows (in units of `row_multiple`), are
# of the form m * 2**k with m up to these, which makes 16 lengths in an octave, of at most 6 % padding, and 4 numbers of rows.
LENGTH_STEPS = 32
ROW_STEPS = 8
MAX_WASTE = 1.15  # patches computed / real


@dataclass(frozen=True)
class Cut:
    """A frame cut into windows."""

    window: np.ndarray  # [cells] window of each cell, cells in raster order
    offset: np.ndarray  # [cells] place of the cell in its window
    sizes: np.ndarray  # [windows] cells
    places: np.ndarray  # [cells, merge * merge, 2] row and column of each patch in the frame


@dataclass(frozen=True)
class Layout:
    rows: int
    row_length: int  # patches
    groups: int
    cells: tuple[np.ndarray, ...]  # for each frame, [cells]: the place among all rows of each of its visual tokens in raster order
    windows: np.ndarray  # [rows, patches] int32
    frames: np.ndarray  # [rows, patches] int32
    places: np.ndarray  # [rows, patches, 2] int32


def lay_out(sizes: Sequence[Size], config: VisionConfig, row_multiple: int = 1) -> Layout:
    """Rows of the shape that costs least, their number a multiple of `row_multiple`: the devices that share them."""
    if not sizes:
        raise ValueError("there are no frames to lay out")
    cuts = [cut_frame(*check_size(size, config), config) for size in sizes]
    rows, slots, row_of_frame = choose_shape(cuts, config, row_multiple)
    return place_windows(cuts, row_of_frame, rows, slots * config.window_patches, 1, config)


def lay_out_groups(groups: Sequence[Sequence[Size]], config: VisionConfig, *, row_length: int, rows_per_group: int = 1) -> Layout:
    """Rows of a given shape, in which the frames of each group lie in the rows of that group."""
    if row_length % config.window_patches or row_length < 1:
        raise RequestError(f"a vision row of {row_length} patches is no multiple of a window's {config.window_patches}: round it up")
    slots = row_length // config.window_patches
    cuts: list[Cut] = []
    row_of_frame: list[np.ndarray] = []
    for group, sizes in enumerate(groups):
        new = [cut_frame(*check_size(size, config), config) for size in sizes]
        assigned = spread(np.array([len(cut.window) for cut in new], int), rows_per_group)
        needed = max(slots_needed(row, config) for row in by_row(new, assigned, rows_per_group))
        if needed > slots:
            raise RequestError(
                f"the pictures of row {group} need {needed * config.window_patches} patches, a vision row has {row_length}: "
                "make vision rows longer, pictures smaller, or put fewer of them into a row"
            )
        cuts += new
        row_of_frame.append(assigned + group * rows_per_group)
    rows = len(groups) * rows_per_group
    return place_windows(cuts, np.concatenate([np.zeros(0, int), *row_of_frame]), rows, row_length, len(groups), config)


def fill_rows(layout: Layout, patches: Sequence[np.ndarray], config: VisionConfig, levels: Levels | None = None) -> VisionRows:
    """Copy the patches of each frame, [patches, values] in the image processor's order, to their places; bytes with their `levels`."""
    group = config.merge**2
    filled = np.zeros((layout.rows * layout.row_length // group, group * config.patch_values), np.float32 if levels is None else np.uint8)
    for cells, values in zip(layout.cells, patches, strict=True):
        filled[cells] = values.reshape(len(cells), -1)
    filled = filled.reshape(layout.rows, layout.row_length, config.patch_values)
    return VisionRows(filled, layout.windows, layout.frames, layout.places, layout.groups, levels)


def check_size(size: Size, config: VisionConfig) -> Size:
    rows, columns = size
    if rows % config.merge or columns % config.merge or min(rows, columns) < 1:
        raise RequestError(f"a frame of {rows}x{columns} patches cannot be merged by {config.merge}x{config.merge}")
    return rows, columns


@functools.lru_cache(maxsize=1024)
def cut_frame(rows: int, columns: int, config: VisionConfig) -> Cut:
    merge, side = config.merge, window_side(config)
    rows, columns = rows // merge, columns // merge  # cells from here on
    row, column = (axis.ravel() for axis in np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    across = -(-columns // side)
    window = row // side * across + column // side
    width = np.minimum(side, columns - column // side * side)  # of the cell's window
    offset = row % side * width + column % side
    inner = np.stack(np.meshgrid(np.arange(merge), np.arange(merge), indexing="ij"), axis=-1).reshape(-1, 2)
    places = np.stack([row, column], axis=-1)[:, None] * merge + inner
    return Cut(window, offset, np.bincount(window), places.astype(np.int32))


def window_side(config: VisionConfig) -> int:
    """Cells along a side of a full window."""
    return config.window // config.patch // config.merge


def choose_shape(cuts: Sequence[Cut], config: VisionConfig, row_multiple: int) -> tuple[int, int, np.ndarray]:
    """Number of rows, slots in a row, and the row of each frame, at the least cost."""
    cells = np.array([len(cut.window) for cut in cuts])
    capacity = window_side(config) ** 2

    def cost(rows: int, slots: int) -> tuple[bool, float]:
        # Short rows spare full attention, but wherever it can be had, padding stays within its bound.
        return rows * slots * capacity > MAX_WASTE * cells.sum(), row_cost(rows, slots, config)

    candidates = []
    for multiple in row_numbers(-(-len(cuts) // row_multiple)):
        rows = multiple * row_multiple
        row_of_frame = spread(cells, rows)
        fewest = -(-int(np.bincount(row_of_frame, cells, rows).max()) // capacity)
        candidates.append((cost(rows, round_up(fewest, LENGTH_STEPS)), rows, row_of_frame))
    best: tuple[tuple[bool, float], int, int, np.ndarray] | None = None
    # What partial windows waste is known only when they are packed, which is dear: from the cheapest on, until nothing can win.
    for bound, rows, row_of_frame in sorted(candidates, key=lambda candidate: candidate[:2]):
        if best is not None and bound >= best[0]:
            break
        slots = round_up(max(slots_needed(row, config) for row in by_row(cuts, row_of_frame, rows)), LENGTH_STEPS)
        if best is None or cost(rows, slots) < best[0]:
            best = (cost(rows, slots), rows, slots, row_of_frame)
    assert best is not None
    return best[1:]


def row_cost(rows: int, slots: int, config: VisionConfig) -> float:
    """Multiplications of the vision tower: what grows with the patches, and full attention, which grows with their square."""
    length = slots * config.window_patches
    linear = config.layers * (4 * config.width**2 + 3 * config.width * config.ffn)
    attention = len(config.full_attention_layers) * 2 * config.width * length
    return float(rows * length * (linear + attention))


def spread(cells: np.ndarray, rows: int) -> np.ndarray:
    """The row of each frame: the largest first, each into the emptiest row."""
    row_of_frame = np.zeros(len(cells), int)
    loads = [(0, row) for row in range(rows)]
    for frame in np.argsort(-cells, kind="stable"):
        load, row = loads[0]
        row_of_frame[frame] = row
        heapq.heapreplace(loads, (load + int(cells[frame]), row))
    return row_of_frame


def by_row(cuts: Sequence[Cut], row_of_frame: np.ndarray, rows: int) -> list[list[Cut]]:
    members: list[list[Cut]] = [[] for _ in range(rows)]
    for cut, row in zip(cuts, row_of_frame.tolist(), strict=True):
        members[row].append(cut)
    return members


def row_numbers(limit: int) -> list[int]:
    """Numbers of rows to try: up to the first that gives each frame its own."""
    numbers = [1]
    while numbers[-1] < limit:
        numbers.append(round_up(numbers[-1] + 1, ROW_STEPS))
    return numbers


def round_up(number: int, most: int) -> int:
    """The least m * 2**k from `number` on with m up to `most`."""
    unit = 1
    while -(-number // unit) > most:
        unit *= 2
    return -(-number // unit) * unit


def slots_needed(cuts: Sequence[Cut], config: VisionConfig) -> int:
    if not cuts:
        return 0
    sizes = np.concatenate([cut.sizes for cut in cuts])
    capacity = window_side(config) ** 2
    partial = sizes[sizes < capacity]
    return int(len(sizes) - len(partial) + pack(partial, capacity)[1])


def pack(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Starts [windows] of partial windows in slots of `capacity` cells that follow each other, and the number of slots.

    The largest first, each into the fullest slot that takes it. Windows of a size, of which there are many, go together.
    """
    starts = np.zeros(len(sizes), int)
    by_size = {int(size): np.flatnonzero(sizes == size).tolist() for size in np.unique(sizes)}
    open_slots: dict[int, list[int]] = {room: [] for room in range(capacity + 1)}
    count = 0
    for size in sorted(by_size, reverse=True):
        waiting = by_size[size]
        room = size
        while waiting:
            while room <= capacity and not open_slots[room]:
                room += 1
            if room > capacity:  # nothing open takes it
                new = -(-len(waiting) // (capacity // size))
                open_slots[capacity] = list(range(count, count + new))
                count += new
                room = capacity
            taken = open_slots[room][: len(waiting)]
            open_slots[room] = open_slots[room][len(taken) :]
            starts[waiting[: len(taken)]] = np.array(taken) * capacity + capacity - room
            waiting = waiting[len(taken) :]
            open_slots[room - size] = taken + open_slots[room - size]
            room = size
    return starts, count


def place_windows(cuts: Sequence[Cut], row_of_frame: np.ndarray, rows: int, row_length: int, groups: int, config: VisionConfig) -> Layout:
    group = config.merge**2
    capacity = window_side(config) ** 2
    row_cells = row_length // group
    windows = np.zeros((rows * row_cells, group), np.int32)
    frames = np.zeros((rows * row_cells, group), np.int32)
    places = np.zeros((rows * row_cells, group, 2), np.int32)
    cells: list[np.ndarray] = [np.zeros(0, int)] * len(cuts)
    for row in range(rows):
        members = np.flatnonzero(row_of_frame == row).tolist()
        if not members:
            continue
        chosen = [cuts[frame] for frame in members]
        counts = np.array([len(cut.sizes) for cut in chosen])
        sizes = np.concatenate([cut.sizes for cut in chosen])
        full = sizes == capacity
        starts = np.empty(len(sizes), int)
        starts[full] = np.arange(full.sum()) * capacity
        starts[~full] = pack(sizes[~full], capacity)[0] + int(full.sum()) * capacity
        first = np.cumsum(counts) - counts  # window of each frame
        lengths = np.array([len(cut.window) for cut in chosen])
        window = np.concatenate([cut.window for cut in chosen]) + np.repeat(first, lengths)
        start = starts[window]
        cell = row * row_cells + start + np.concatenate([cut.offset for cut in chosen])
        # A window's number is where it starts, which no other window of the row shares.
        windows[cell] = (start + 1)[:, None]
        frames[cell] = np.repeat(np.arange(1, len(chosen) + 1), lengths)[:, None]
        places[cell] = np.concatenate([cut.places for cut in chosen])
        for frame, own in zip(members, np.split(cell, np.cumsum(lengths)[:-1]), strict=True):
            cells[frame] = own
    shape = (rows, row_length)
    return Layout(rows, row_length, groups, tuple(cells), windows.reshape(shape), frames.reshape(shape), places.reshape(*shape, 2))
