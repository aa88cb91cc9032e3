"""Small random conversations, for us and for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from blm_jax.config import BackboneConfig
from blm_jax.data.positions import Grid, rope_positions
from blm_jax.data.prompt import Example
from blm_jax.data.vision.pictures import Picture

WORDS = 300  # ids below are plain words
# In patches of a vision tower that merges 2x2. Few fill their windows; one is a strip.
TEXT: tuple[Grid, ...] = ()
IMAGE = (Grid(1, 10, 14),)
IMAGES = (Grid(1, 4, 6), Grid(1, 16, 8), Grid(1, 2, 22))
VIDEO = (Grid(3, 6, 10, seconds=0.75),)
MIXED = (Grid(1, 6, 4), Grid(2, 4, 4, seconds=1.3))


def make_example(config: BackboneConfig, grids: Sequence[Grid], seed: int, words: int = 12) -> Example:
    rng = np.random.default_rng(seed)

    def text(count: int) -> list[int]:
        return rng.integers(0, WORDS, count).tolist()

    tokens, pictures = text(words), []
    for grid in grids:
        kind = config.tokens.image if grid.seconds is None else config.tokens.video
        tokens += [config.tokens.vision_start] + [kind] * grid.visual_tokens(config.vision.merge) + [config.tokens.vision_end] + text(3)
        pictures.append(Picture(rng.normal(size=(grid.patches, config.vision.patch_values)).astype(np.float32), grid))
    tokens = np.array(tokens + text(words), np.int32)
    positions = rope_positions(tokens, grids, config)
    supervised = (tokens < WORDS) & (rng.random(len(tokens)) < 0.5)
    return Example(tokens, positions, supervised, tuple(pictures), int(positions.max()) + 1)


def torch_inputs(examples: Sequence[Example], config: BackboneConfig) -> dict[str, Any]:
    """The same conversations as the reference wants them, padded on the right."""
    length = max(len(example.tokens) for example in examples)
    ids = np.full((len(examples), length), config.tokens.pad)
    mask = np.zeros((len(examples), length), int)
    for i, example in enumerate(examples):
        ids[i, : len(example.tokens)] = example.tokens
        mask[i, : len(example.tokens)] = 1
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor((ids == config.tokens.image) * 1 + (ids == config.tokens.video) * 2),
    }
    pictures = [picture for example in examples for picture in example.pictures]
    for names, chosen in (
        (("pixel_values", "image_grid_thw"), [picture for picture in pictures if picture.grid.seconds is None]),
        (("pixel_values_videos", "video_grid_thw"), [picture for picture in pictures if picture.grid.seconds is not None]),
    ):
        if chosen:
            inputs[names[0]] = torch.tensor(np.concatenate([picture.patches for picture in chosen]))
            inputs[names[1]] = torch.tensor([[picture.grid.frames, picture.grid.rows, picture.grid.columns] for picture in chosen])
    seconds = [picture.grid.seconds for picture in pictures if picture.grid.seconds is not None]
    if seconds:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs
