"""The one contract between data and models: what a batch is, in plain arrays.

Data fills these with NumPy on the host; models read the same fields as device arrays. Neither side knows more of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# np.ndarray on the host, jax.Array on devices: this module imports neither side.
Array = Any


@dataclass(frozen=True)
class VisionRows:
    """Pictures and video frames cut into patches and packed into rows of equal length.

    A frame (a picture, or one temporal patch of a video) never leaves its row. Within a row, patches lie in slots of one
    attention window each: a full window fills a slot, partial windows share slots. The merge x merge patches that become
    one visual token stay together and in order, so merging is a reshape.
    """

    patches: Array  # [rows, patches, channels * temporal_patch * patch * patch], in that order; float32, or uint8 and `levels`
    windows: Array  # [rows, patches] int32, window-attention segment, unique within its slot; 0 is padding
    frames: Array  # [rows, patches] int32, full-attention segment, unique within its row; 0 is padding
    places: Array  # [rows, patches, 2] int32, row and column of the patch in its frame
    # Rows are divided evenly into groups, text rows likewise: text group g sees the visual tokens of vision group g.
    # One group lets any text row use any vision row (an all-gather on a mesh); a group a text row needs none.
    groups: int = field(default=1, metadata={"static": True})
    # What bytes mean: value = scale * byte + offset, (scale, offset) by channel. A quarter of the memory, on the way to devices too.
    levels: tuple[tuple[float, float], ...] | None = field(default=None, metadata={"static": True})


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. Several examples may share a row; they never see each other."""

    tokens: Array  # [rows, length] int32
    segments: Array  # [rows, length] int32, example within the row, counted from 1; 0 is padding
    positions: Array  # [rows, 3, length] int32, time, height and width for the rotary embedding
    slots: Array  # [rows, length] int32, index of the visual token of the row's group that stands here; -1 is text
    targets: Array  # [rows, length] int32, the token that follows within the example
    weights: Array  # [rows, length] float32, weight of that target in the loss
    vision: VisionRows | None = None
    sources: Array | None = None  # [rows, length] int32, the corpus an example is from, by which training tells losses apart


@dataclass(frozen=True)
class IntentRows:
    """Hidden states of block k, one observation a row, with what the backbone does not tell: where each token was seen."""

    hidden: Array  # [rows, tokens, width]
    mask: Array  # [rows, tokens] bool: vision tokens and the prompt after them
    places: Array  # [rows, tokens, 4] int32: camera counted from 1, row, column, time, in visual tokens; zeros for text


@dataclass(frozen=True)
class RobotRows:
    """Which robot, and where it is. Values of dimensions a robot lacks are ignored, whatever they are."""

    robot: Array  # [rows] int32, row of the policy's table
    state: Array  # [rows, state_width] float32, normalised
    state_mask: Array  # [rows, state_width] bool
    action_mask: Array  # [rows, horizon, action_width] bool: dimensions the robot has, steps its chunk has


@dataclass(frozen=True)
class Chunks:
    """What a demonstration did: normalised actions, and which of them count."""

    actions: Array  # [rows, horizon, action_width] float32
    mask: Array  # [rows, horizon, action_width] bool: false past the episode's end too


@dataclass(frozen=True)
class Prompts:
    """Observations as the backbone reads them, one a row, and which of its hidden states become `IntentRows`."""

    batch: Batch
    mask: Array  # [rows, length] bool
    places: Array  # [rows, length, 4] int32


@dataclass(frozen=True)
class Moments:
    """What a policy learns from: a moment of a demonstration a row, seen as prompts for the backbone, or as what it made of them."""

    robots: RobotRows
    chunks: Chunks
    has_future: Array  # [rows] bool: false past an episode's end, where `future` is a row of nothing
    seen: Prompts | IntentRows
    future: Prompts | IntentRows  # a chunk later
    task: Array | None = None  # [rows] int32, by which training tells losses apart
