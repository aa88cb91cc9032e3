"""Positions against transformers: 5.23 runs here, numbers of 4.57 are kept in tests/golden/data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from blm_jax.config import BackboneConfig, VideoPositions
from blm_jax.data.positions import Grid, rope_positions
from blm_jax.errors import RequestError

# Made by calling get_rope_index of the released wheel of transformers 4.57.6 on these sequences.
GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "positions_transformers_4.57.6.json"
PLAIN = 1  # any id that has no meaning of its own

Parts = list[int | Grid]  # a number of text tokens, a picture or a video


def sequence(parts: Parts, config: BackboneConfig) -> tuple[np.ndarray, list[Grid]]:
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens += [PLAIN] * part
        else:
            pad = config.tokens.image if part.seconds is None else config.tokens.video
            tokens += [config.tokens.vision_start, *[pad] * part.visual_tokens(2), config.tokens.vision_end]
    return np.array(tokens, np.int32), [part for part in parts if isinstance(part, Grid)]


def reference(tokens: np.ndarray, grids: list[Grid], config: BackboneConfig) -> tuple[np.ndarray, int]:
    vision = SimpleNamespace(spatial_merge_size=config.vision.merge, tokens_per_second=config.vision.tokens_per_second)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *args, **kwargs: Qwen2_5_VLModel.get_vision_position_ids(model, *args, **kwargs)  # type: ignore[arg-type]
    kinds = np.where(tokens == config.tokens.image, 1, np.where(tokens == config.tokens.video, 2, 0))
    sizes = [[[g.frames, g.rows, g.columns] for g in grids if (g.seconds is None) == still] for still in (True, False)]
    arguments: list[Any] = [
        model,
        torch.tensor(tokens[None].astype(np.int64)),
        torch.tensor(kinds[None]),
        torch.tensor(sizes[0]) if sizes[0] else None,
        torch.tensor(sizes[1]) if sizes[1] else None,
        torch.tensor([g.seconds for g in grids if g.seconds is not None]),
    ]
    positions, delta = Qwen2_5_VLModel.get_rope_index(*arguments)
    return positions[:, 0].numpy(), int(delta[0, 0]) + len(tokens)


def behaving(config: BackboneConfig, positions: VideoPositions, tokens_per_second: int = 2) -> BackboneConfig:
    return replace(config, video_positions=positions, vision=replace(config.vision, tokens_per_second=tokens_per_second))


sides = st.integers(1, 6).map(lambda n: 2 * n)
pictures = st.builds(Grid, st.just(1), sides, sides)
videos = st.builds(Grid, st.integers(1, 8), sides, sides, st.floats(0.05, 5).map(lambda x: round(x, 3)))


@given(st.lists(st.one_of(st.integers(1, 9), pictures), min_size=1, max_size=6))
@pytest.mark.parametrize("behaviour", ["blm", "transformers-4.57", "transformers-5.23"])
def test_pictures_stand_where_transformers_puts_them(backbone: BackboneConfig, behaviour: VideoPositions, parts: Parts) -> None:
    tokens, grids = sequence(parts, backbone)
    expected, following = reference(tokens, grids, backbone)
    positions = rope_positions(tokens, grids, behaving(backbone, behaviour))
    np.testing.assert_array_equal(positions, expected)
    assert positions.max() + 1 == following


@given(st.lists(st.one_of(st.integers(1, 9), pictures, videos), min_size=1, max_size=6), st.sampled_from([1, 2, 25]))
def test_videos_as_in_5_23(backbone: BackboneConfig, parts: Parts, tokens_per_second: int) -> None:
    config = behaving(backbone, "transformers-5.23", tokens_per_second)
    tokens, grids = sequence(parts, config)
    expected, following = reference(tokens, grids, config)
    positions = rope_positions(tokens, grids, config)
    np.testing.assert_array_equal(positions, expected)
    assert positions.max() + 1 == following


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"])
def test_videos_as_in_4_57(backbone: BackboneConfig, case: dict) -> None:
    config = behaving(backbone, "transformers-4.57", case["tokens_per_second"])
    make = {"text": int, "image": lambda h, w: Grid(1, h, w), "video": Grid}
    tokens, grids = sequence([make[kind](*sizes) for kind, *sizes in case["parts"]], config)
    positions = rope_positions(tokens, grids, config)
    np.testing.assert_array_equal(positions, case["positions"])
    assert positions.max() + 1 == case["next"]


@settings(max_examples=50)
@given(st.integers(1, 9), videos, st.integers(1, 9))
def test_ours_keeps_fractions_and_never_overlaps(backbone: BackboneConfig, before: int, video: Grid, after: int) -> None:
    tokens, grids = sequence([before, video, after], backbone)
    ours = rope_positions(tokens, grids, backbone)
    inside = tokens == backbone.tokens.video
    newest = rope_positions(tokens, grids, behaving(backbone, "transformers-5.23"))
    np.testing.assert_array_equal(ours[:, inside], newest[:, inside])  # fractions of a second as there
    end = int(np.flatnonzero(inside)[-1]) + 1
    np.testing.assert_array_equal(ours[:, end:], ours[:, :end].max() + 1 + np.arange(after + 1) + np.zeros((3, 1), int))


def test_half_seconds_part_the_three(backbone: BackboneConfig) -> None:
    """Three frames half a second apart, at two positions a second, then text: worked out by hand."""
    tokens, grids = sequence([1, Grid(3, 2, 2, 0.5), 1], backbone)
    by_name = {
        name: rope_positions(tokens, grids, behaving(backbone, name))[0].tolist()
        for name in ("blm", "transformers-4.57", "transformers-5.23")
    }
    assert by_name == {
        "blm": [0, 1, 2, 3, 4, 5, 6],
        "transformers-4.57": [0, 1, 2, 2, 2, 3, 4],
        "transformers-5.23": [0, 1, 2, 3, 4, 3, 4],
    }


@pytest.mark.parametrize(("place", "count"), [(0, 1), (1, 3), (1, 5)])
def test_placeholders_that_fit_no_picture(backbone: BackboneConfig, place: int, count: int) -> None:
    tokens = np.array([PLAIN] * place + [backbone.tokens.image] * count)
    grids = [Grid(1, 4, 4)] if place else []
    with pytest.raises(RequestError, match="placeholder"):
        rope_positions(tokens, grids, backbone)
