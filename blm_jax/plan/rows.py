"""Rows of data as a plan takes them: of the shapes that training and acting see, full, and made of nothing.

What a step needs is counted on them too, so they are as full as rows can be: a picture beside a picture, one example a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from blm_jax import mesh as meshes
from blm_jax.batch import Batch, Chunks, IntentRows, Moments, Prompts, RobotRows, VisionRows
from blm_jax.config import BackboneConfig, PolicyConfig, VisionConfig
from blm_jax.data.demos.robots import Robot, action_mask, state_mask
from blm_jax.data.vision.pixels import PixelConfig, fit_size
from blm_jax.data.vision.windows import Size, cut_frame, lay_out_groups, slots_needed

PICTURE = 336  # pixels along a side, in conversations
TEMPLATE = 32  # tokens of an observation's prompt beside pictures and instruction
ROUND = 32  # lengths of prompts are multiples of it
NO_LEVELS = ((1.0, 0.0),) * 3  # pictures come as bytes, whatever they mean


def conversation(config: BackboneConfig, length: int, row_length: int | None) -> Batch:
    """One row of Stage I, full. Without `row_length`, half of its tokens are of pictures."""
    cell = config.vision.merge**2
    side = PICTURE // config.vision.patch // config.vision.merge * config.vision.merge
    if row_length is None:
        row_length = -(-length * cell // 2 // config.vision.window_patches) * config.vision.window_patches
    slots = slots_needed([cut_frame(side, side, config.vision)], config.vision)
    sizes = [(side, side)] * (row_length // (slots * config.vision.window_patches))
    batch = _text(length)
    vision = None if row_length == 0 else _pictures(sizes, row_length, config.vision)
    return replace(batch, vision=vision, sources=np.zeros((1, length), np.int32))


def sizes(row: Batch, config: VisionConfig) -> list[Size]:
    """Of the pictures of a conversation."""
    if row.vision is None:
        return []
    frames, places = row.vision.frames, row.vision.places
    ends = [places[frames == frame].max(axis=0) + 1 for frame in range(1, int(frames.max()) + 1)]
    return [(int(rows), int(columns)) for rows, columns in ends]


def prompts(config: BackboneConfig, policy: PolicyConfig, robot: Robot, instruction_tokens: int) -> Prompts:
    """What a backbone reads of one observation of this robot."""
    sizes = picture_sizes(robot, config.vision)
    visual = sum(rows * columns for rows, columns in sizes) // config.vision.merge**2
    seen, begin = visual + instruction_tokens, visual if policy.instruction == "alone" else 0
    length = -(-(seen + TEMPLATE) // ROUND) * ROUND
    row_length = slots_needed([cut_frame(*size, config.vision) for size in sizes], config.vision) * config.vision.window_patches
    batch = replace(_text(length), vision=_pictures(sizes, row_length, config.vision))
    places = np.arange(length)[None]
    return Prompts(batch, (places >= begin) & (places < seen), np.zeros((1, length, 4), np.int32))


def intents(of: Prompts, width: int, dtype: Any) -> IntentRows:
    """What was made of such prompts before: of tokens that count, and no others."""
    tokens = -(-int(of.mask.sum()) // ROUND) * ROUND
    mask = np.arange(tokens)[None] < of.mask.sum()
    return IntentRows(np.zeros((1, tokens, width), dtype), mask, of.places[:, :tokens])


def moment(policy: PolicyConfig, robot: Robot, seen: Prompts | IntentRows) -> Moments:
    counts = action_mask(robot, policy.horizon, policy.embodiment.action_width)[None]
    chunks = Chunks(np.zeros(counts.shape, np.float32), counts)
    return Moments(robot_rows(policy, robot), chunks, np.ones(1, bool), seen, seen, np.zeros(1, np.int32))


def robot_rows(policy: PolicyConfig, robot: Robot) -> RobotRows:
    widths = policy.embodiment.state_width, policy.embodiment.action_width
    mask = state_mask(robot, widths[0])[None]
    return RobotRows(np.zeros(1, np.int32), np.zeros(mask.shape, np.float32), mask, action_mask(robot, policy.horizon, widths[1])[None])


def picture_sizes(robot: Robot, config: VisionConfig) -> list[Size]:
    pixels = PixelConfig(patch=config.patch, merge=config.merge, temporal_patch=config.temporal_patch)
    fitted = [fit_size(camera.height, camera.width, pixels.factor, pixels.min_pixels, pixels.max_pixels) for camera in robot.cameras]
    return [(height // config.patch, width // config.patch) for height, width in fitted]


def on(mesh: Mesh, row: Any, count: int) -> Any:
    """So many of these rows, as shapes divided over a mesh."""
    sharding = NamedSharding(mesh, meshes.by_rows())

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count * len(x), *x.shape[1:]), x.dtype, sharding=sharding)

    def grouped(x: Any) -> Any:
        return replace(x, groups=count) if isinstance(x, VisionRows) else x

    shapes = jax.tree.map(leaf, row)
    return jax.tree.map(grouped, shapes, is_leaf=lambda x: isinstance(x, VisionRows))


def _text(length: int) -> Batch:
    whole = np.ones((1, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (1, 3, length))
    return Batch(whole, whole, positions, -whole, whole, np.ones((1, length), np.float32))


def _pictures(sizes: Sequence[Size], row_length: int, config: VisionConfig) -> VisionRows:
    layout = lay_out_groups([sizes], config, row_length=row_length)
    patches = np.zeros((1, row_length, config.patch_values), np.uint8)
    return VisionRows(patches, layout.windows, layout.frames, layout.places, 1, NO_LEVELS)
