"""Batches: what a row holds, and that each placeholder finds its own visual token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from blm_jax.batch import Batch
from blm_jax.config import BackboneConfig
from blm_jax.data.collate import collate
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.vision.pixels import PixelConfig, levels_of
from blm_jax.errors import RequestError


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def examples(engine: PromptEngine) -> list[Example]:
    def example(*parts: object, answer: str) -> Example:
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        return engine.encode([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])

    def image(height: int, width: int, seed: int) -> dict:
        return {"type": "image", "image": picture(height, width, seed)}

    video = {"type": "video", "video": [picture(70, 110, seed) for seed in range(5)], "min_pixels": 3136, "max_pixels": 9 * 784}
    return [
        example("Hi", answer="Hello"),
        example(image(60, 90, 1), "and", image(200, 120, 2), "?", answer="Two"),
        example(video, "then", image(40, 40, 3), answer="A film"),
    ]


def check(batch: Batch, rows: list[list[Example]], config: BackboneConfig) -> None:
    for i, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            part = slice(start, start + len(example.tokens))
            np.testing.assert_array_equal(batch.tokens[i, part], example.tokens)
            np.testing.assert_array_equal(batch.positions[i, :, part], example.positions)
            assert (batch.segments[i, part] == number).all()
            trained = batch.weights[i, part] == 1
            np.testing.assert_array_equal(np.flatnonzero(trained) + 1, np.flatnonzero(example.supervised))
            np.testing.assert_array_equal(batch.targets[i, part][trained], example.tokens[example.supervised])
            check_visual_tokens(batch, i, part, example, len(rows), config)
            start = part.stop
        for array, padding in ((batch.segments, 0), (batch.weights, 0), (batch.slots, -1), (batch.tokens, config.tokens.pad)):
            assert (array[i, start:] == padding).all()
    assert {array.dtype for array in (batch.tokens, batch.segments, batch.positions, batch.slots, batch.targets)} == {np.dtype(np.int32)}
    assert batch.weights.dtype == np.float32


def check_visual_tokens(batch: Batch, row: int, part: slice, example: Example, rows: int, config: BackboneConfig) -> None:
    slots = batch.slots[row, part]
    visual = np.isin(example.tokens, (config.tokens.image, config.tokens.video))
    np.testing.assert_array_equal(slots >= 0, visual)
    if not visual.any():
        return
    assert batch.vision is not None
    values = config.vision.patch_values * config.vision.merge**2
    groups = batch.vision.patches.reshape(batch.vision.groups, -1, values)
    own = groups[row * batch.vision.groups // rows]
    expected = np.concatenate([p.patches.reshape(-1, values) for p in example.pictures])
    np.testing.assert_array_equal(own[slots[visual]], expected)


def test_an_example_a_row(examples: list[Example], backbone: BackboneConfig) -> None:
    rows = [[example] for example in examples]
    batch = collate(rows, backbone, row_multiple=2)
    check(batch, rows, backbone)
    assert batch.tokens.shape == (3, max(len(example.tokens) for example in examples))
    assert batch.vision is not None and batch.vision.groups == 1 and batch.vision.patches.shape[0] % 2 == 0
    assert batch.vision.patches.dtype == np.float32


def test_several_examples_in_a_row(examples: list[Example], backbone: BackboneConfig) -> None:
    rows = [[examples[2], examples[0]], [examples[1], examples[1], examples[0]], []]
    batch = collate(rows, backbone, length=1024)
    check(batch, rows, backbone)
    assert batch.tokens.shape == (3, 1024) and (batch.segments[2] == 0).all()
    # The last token of an example is followed by another example's first, which is no target of it.
    end = len(examples[2].tokens)
    assert batch.weights[0, end - 1] == 0


def test_pictures_by_group(examples: list[Example], backbone: BackboneConfig) -> None:
    rows = [[examples[0]], [examples[2], examples[1]], [examples[1]]]
    for vision_rows in (1, 2):
        batch = collate(rows, backbone, length=512, vision_row_length=512, vision_rows_per_group=vision_rows)
        check(batch, rows, backbone)
        assert batch.vision is not None and batch.vision.groups == 3
        assert batch.vision.patches.shape == (3 * vision_rows, 512, 1176)


def test_pictures_stay_bytes(examples: list[Example], backbone: BackboneConfig, pixels: PixelConfig) -> None:
    rows = [[examples[1]], [examples[0]]]
    settings: dict[str, Any] = {"length": 512, "vision_row_length": 512}
    plain, raw = collate(rows, backbone, **settings), collate(rows, backbone, **settings, levels=levels_of(pixels))
    assert plain.vision is not None and raw.vision is not None and raw.vision.patches.dtype == np.uint8
    scale, offset = np.repeat(np.array(raw.vision.levels), backbone.vision.patch_values // 3, axis=0).T
    seen = raw.vision.frames > 0
    np.testing.assert_allclose((raw.vision.patches * scale + offset)[seen], plain.vision.patches[seen], atol=1e-6)


def test_text_alone(examples: list[Example], backbone: BackboneConfig) -> None:
    rows = [[examples[0]], [examples[0], examples[0]]]
    batch = collate(rows, backbone)
    check(batch, rows, backbone)
    assert batch.vision is None
    fixed = collate(rows, backbone, vision_row_length=64)  # one program for all batches, with pictures and without
    assert fixed.vision is not None and (fixed.vision.frames == 0).all()


def test_what_does_not_fit(examples: list[Example], backbone: BackboneConfig) -> None:
    length = len(examples[1].tokens)
    with pytest.raises(RequestError, match=f"a row of {length} tokens does not fit a length of {length - 1}"):
        collate([[examples[1]]], backbone, length=length - 1)
    with pytest.raises(RequestError, match="the pictures of row 1 need"):
        collate([[examples[0]], [examples[1]]], backbone, vision_row_length=64)
