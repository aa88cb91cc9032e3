"""The lengths of a made-up corpus, as preparation finds them: what packing is measured on.

    python -m tests.data.corpora.lengths        # writes lengths.npy anew

Text of 20 to 800 tokens; 15 % of the records are text alone, 2 % have a video of 4 to 32 frames, the others 1 to 8 pictures of a
camera's shapes with a long side of 224 to 1024 pixels, shrunk to 256 visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from blm_jax.config import VisionConfig
from blm_jax.data.corpora.budget import vision_work
from blm_jax.data.vision.pixels import fit_size
from blm_jax.data.vision.windows import Size

FILE = Path(__file__).with_name("lengths.npy")  # [records, 3] uint16: tokens, vision work, patches
RECORDS = 32768
TOWER = VisionConfig(layers=32, width=1280, heads=16, ffn=3420, out_width=3584, full_attention_layers=(7, 15, 23, 31))
SHAPES = ((4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (1, 1))
CELL = 28  # pixels along a visual token


def records() -> Iterator[tuple[int, list[Size]]]:
    """Tokens of each record, and its frames in patches."""
    random = np.random.RandomState(0)  # NumPy keeps its numbers for ever
    while True:
        text, kind = random.randint(20, 801), random.random_sample()
        if kind < 0.15:
            frames, marks = [], 0
        elif kind < 0.17:
            frames, marks = [frame(random, 160)] * random.randint(2, 17), 2
        else:
            pictures = random.randint(1, 9)
            frames, marks = [frame(random, 256) for _ in range(pictures)], 2 * pictures
        yield text + marks + patches(frames) // 4, frames


def frame(random: np.random.RandomState, most: int) -> Size:
    long = 224 * (1024 / 224) ** random.random_sample()
    height, width = SHAPES[random.randint(len(SHAPES))]
    scale = long / max(height, width)
    height, width = fit_size(round(height * scale), round(width * scale), CELL, 56 * 56, most * CELL**2)
    return height // 14, width // 14


def patches(frames: list[Size]) -> int:
    return sum(rows * columns for rows, columns in frames)


def rows(count: int) -> np.ndarray:
    made = islice(records(), count)
    return np.array([(tokens, vision_work(frames, TOWER), patches(frames)) for tokens, frames in made], np.uint16)


if __name__ == "__main__":
    np.save(FILE, rows(RECORDS))
