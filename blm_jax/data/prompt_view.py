"""A prompt as people read it: text, what is learned of it, and pictures, which are made again from the patches that a model reads."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blm_jax.data import page
from blm_jax.data.page import printable
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.vision.pictures import Picture
from blm_jax.data.vision.pixels import PixelConfig

BRACKETS = "\u27e6", "\u27e7"  # around what is learned, on a terminal: hardly any text has them
MOST_FRAMES = 32  # of a video that a page shows


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that are alike: of one picture, learned text, or text that is not."""

    text: str  # of a picture: what it is
    learned: bool
    picture: int | None = None  # which of the example's


def stretches(example: Example, engine: PromptEngine) -> list[Stretch]:
    merge = engine.config.vision.merge
    counts = [picture.grid.visual_tokens(merge) for picture in example.pictures]
    owners = np.full(len(example.tokens), -1)  # the picture of each token
    owners[np.isin(example.tokens, (engine.config.tokens.image, engine.config.tokens.video))] = np.repeat(np.arange(len(counts)), counts)
    changes = np.flatnonzero((np.diff(owners) != 0) | (np.diff(example.supervised) != 0)) + 1
    found: list[Stretch] = []
    for start, stop in itertools.pairwise([0, *changes.tolist(), len(owners)]):
        learned, owner = bool(example.supervised[start]), int(owners[start])
        if owner < 0:
            text = engine.tokenizer.decode(example.tokens[start:stop], skip_special=False)
            found.append(Stretch(printable(text), learned))
        else:
            found.append(Stretch(_placeholder(owner, example.pictures[owner], engine.pixels), learned, owner))
    return found


def _placeholder(number: int, picture: Picture, config: PixelConfig) -> str:
    grid = picture.grid
    size, tokens = f"{grid.columns * config.patch}x{grid.rows * config.patch}", f"{grid.visual_tokens(config.merge)} tokens"
    if grid.seconds is None:
        return f"[picture {number + 1}: image of {size}, {tokens}]"
    frames = grid.frames * config.temporal_patch
    return f"[picture {number + 1}: video of {frames} frames of {size}, {grid.frames * grid.seconds:.3g} s, {tokens}]"


def as_text(found: Sequence[Stretch]) -> str:
    """Pictures by what they are, and brackets around what is learned."""
    return "".join(BRACKETS[0] + stretch.text + BRACKETS[1] if stretch.learned else stretch.text for stretch in found)


def as_html(found: Sequence[Stretch], example: Example, config: PixelConfig) -> str:
    """With the pictures, and marks for what is learned."""
    parts = []
    for stretch in found:
        text = html.escape(stretch.text)
        if stretch.picture is not None:
            parts.append(_figure(text, example.pictures[stretch.picture], config))
        else:
            parts.append(f"<mark>{text}</mark>" if stretch.learned else text)
    return f'<div class="prompt">{"".join(parts)}</div>'


def _figure(caption: str, picture: Picture, config: PixelConfig) -> str:
    frames = frames_of(picture, config)
    if picture.grid.seconds is None:
        frames = frames[:1]  # the others are its copies
    chosen = page.spread(len(frames), MOST_FRAMES)
    if len(chosen) < len(frames):
        caption += f", {len(chosen)} of its frames"
    images = "".join(page.picture(frames[i]) for i in chosen)
    return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"


def frames_of(picture: Picture, config: PixelConfig) -> np.ndarray:
    """The pixels [frames, height, width, 3] uint8 that were cut into these patches."""
    grid, merge, patch, depth = picture.grid, config.merge, config.patch, config.temporal_patch
    shape = (grid.frames, grid.rows // merge, grid.columns // merge, merge, merge, 3, depth, patch, patch)
    # The order of `cut_patches` undone: [time, depth, rows, merge, patch, columns, merge, patch, channels].
    values = picture.patches.reshape(shape).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    values = values.reshape(grid.frames * depth, grid.rows * patch, grid.columns * patch, 3)
    pixels = (values * np.array(config.std, np.float32) + np.array(config.mean, np.float32)) / config.rescale
    return np.rint(pixels).astype(np.uint8)
