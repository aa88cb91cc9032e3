"""How much a phase asks of a machine at least: parameters, operations, bytes. And what machines can give.

An operation is a multiplication or an addition, so a product of [m, k] and [k, n] has 2 m k n. Only products are counted, causal
attention without what it masks, and nothing for padding or recomputation: what is computed beyond that is loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from blm_jax.config import BackboneConfig, DecoderConfig, PolicyConfig, VisionConfig
from blm_jax.weights.names import table
from blm_jax.weights.policy import PLACE_VALUES

Size = tuple[int, int]  # rows and columns of a picture in patches


class Chip(NamedTuple):
    tflops: float  # dense, bfloat16
    bandwidth: float  # of its memory, GB/s


# The makers' data sheets, by what jax calls the device.
CHIPS = {
    "H200": Chip(989, 4800),
    "TPU v5 lite": Chip(197, 819),
    "TPU v5e": Chip(197, 819),
    "TPU v5p": Chip(459, 2765),
    "TPU v5": Chip(459, 2765),
    "TPU v6 lite": Chip(918, 1640),
    "TPU v6e": Chip(918, 1640),
}


def chip_of(device_kind: str) -> Chip | None:
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def parameters(config: BackboneConfig) -> int:
    return sum(math.prod(entry.shape) for entry in table(config).values())


def layer_weights(config: DecoderConfig) -> int:
    """Of the kernels of one layer of the decoder."""
    attention = 2 * config.width * (config.heads + config.kv_heads) * config.head_dim
    return attention + 3 * config.width * config.ffn


def decoder_operations(config: DecoderConfig, rows: int, length: int, logits: int) -> int:
    """Forward over rows x length tokens, `logits` of which are asked for their next token."""
    pairs = rows * length * (length + 1) // 2  # of a query and a key it sees
    attention = 4 * pairs * config.heads * config.head_dim
    products = 2 * rows * length * layer_weights(config)
    return config.layers * (products + attention) + 2 * logits * config.width * config.vocab


def vision_operations(config: VisionConfig, sizes: Iterable[Size]) -> int:
    full = len(config.full_attention_layers)
    side = config.window // config.patch // config.merge * config.merge
    width, merged = config.width, config.merge**2 * config.width
    total = 0
    for rows, columns in sizes:
        patches = rows * columns
        products = config.patch_values * width + config.layers * (4 * width**2 + 3 * width * config.ffn)
        merger = patches // config.merge**2 * (merged**2 + merged * config.out_width)
        pairs = full * patches**2 + (config.layers - full) * _squares(rows, side) * _squares(columns, side)
        total += 2 * (patches * products + merger) + 4 * pairs * width
    return total


def _squares(length: int, side: int) -> int:
    """Of the lengths of windows along one axis, summed: the last one may be short."""
    return length // side * side**2 + (length % side) ** 2


def decode_bytes(config: DecoderConfig, rows: int, context: int, itemsize: int) -> int:
    """Read to choose one token in each row: all weights once, and the keys and values of `context` tokens a row."""
    weights = config.layers * layer_weights(config) + config.width * config.vocab
    cache = 2 * rows * context * config.layers * config.kv_heads * config.head_dim
    return itemsize * (weights + cache)


# --- acting --------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    operations: int
    bytes: int

    def seconds(self, chip: Chip) -> float:
        """The least that a chip needs, whichever of the two takes it longer."""
        return max(self.operations / (chip.tflops * 1e12), self.bytes / (chip.bandwidth * 1e9))


def acting(
    backbone: BackboneConfig, policy: PolicyConfig, rows: int, samples: int, sizes: Sequence[Size], length: int, itemsize: int
) -> dict[str, Work]:
    """Of `rows` observations of `length` tokens, `sizes` their pictures: parts that follow each other, each reading its weights.

    The table of robots is read for one. Activations are taken to stay where they are made.
    """
    k, steps, tokens = policy.intent_block, policy.objective.steps, rows * length
    decoder = replace(backbone.decoder, layers=k)
    seen = rows * policy.dit.layers * policy.bridge.queries * policy.dit.width  # keys and values of every other layer
    parts = {
        "vision": Work(vision_operations(backbone.vision, sizes), vision_weights(backbone)),
        "decoder": Work(decoder_operations(decoder, rows, length, 0), k * layer_weights(decoder)),
        "bridge": Work(bridge_operations(policy, rows, tokens), bridge_weights(policy)),
        "denoising": Work(steps * step_operations(policy, rows * samples), steps * (step_weights(policy) + seen)),
    }
    return {name: Work(work.operations, work.bytes * itemsize) for name, work in parts.items()}


def vision_weights(config: BackboneConfig) -> int:
    return sum(math.prod(entry.shape) for entry in table(config).values() if entry.path[0] == "vision")


def attention_layer(width: int, ffn: int, memory: int) -> int:
    """Kernels of a layer of bridge or DiT that attends to something `memory` wide."""
    return 2 * width * width + 2 * memory * width + 2 * width * ffn


def bridge_weights(config: PolicyConfig) -> int:
    """With what makes the DiT's keys and values, and encodes the state: all that is used once an observation."""
    bridge, body = config.bridge, config.embodiment
    enter = (config.intent_width + (PLACE_VALUES if bridge.places else 0)) * bridge.width
    blocks = bridge.blocks * 2 * attention_layer(bridge.width, bridge.ffn, bridge.width)
    state = (body.state_width + config.dit.width) * body.hidden
    return enter + blocks + config.dit.layers // 2 * 2 * bridge.width * config.dit.width + state


def bridge_operations(config: PolicyConfig, rows: int, tokens: int) -> int:
    bridge, body = config.bridge, config.embodiment
    width, queries = bridge.width, rows * bridge.queries
    enter = tokens * (config.intent_width + (PLACE_VALUES if bridge.places else 0)) * width
    own = 4 * width**2 + 2 * width * bridge.ffn  # by query
    cross = 2 * width**2 + 2 * width * bridge.ffn
    attention = 2 * width * bridge.queries * (tokens + queries)
    blocks = bridge.blocks * (queries * (own + cross) + 2 * tokens * width**2 + attention)
    memory = config.dit.layers // 2 * 2 * queries * width * config.dit.width
    return 2 * (enter + blocks + memory + rows * (body.state_width + config.dit.width) * body.hidden)


def step_weights(config: PolicyConfig) -> int:
    """Read in each denoising step."""
    width, layers, body = config.dit.width, config.dit.layers, config.embodiment
    pair = 2 * attention_layer(width, config.dit.ffn, width) - 2 * width**2  # the cross-attention's keys and values are there
    actions = body.action_width * width + 3 * width**2 + (width + body.action_width) * body.hidden
    return layers // 2 * pair + _time_weights(config) + actions


def step_operations(config: PolicyConfig, rows: int) -> int:
    """One denoising step; all rows are at the same time."""
    width, queries, horizon = config.dit.width, config.bridge.queries, config.horizon
    tokens, body = 1 + queries + horizon, config.embodiment
    pair = tokens * (6 * width**2 + 4 * width * config.dit.ffn + 2 * width * (queries + tokens))
    actions = horizon * (body.action_width * width + 3 * width**2 + (width + body.action_width) * body.hidden)
    return 2 * (rows * (config.dit.layers // 2 * pair + actions) + _time_weights(config))


def _time_weights(config: PolicyConfig) -> int:
    width = config.dit.width
    return (config.dit.time_features + width) * width + (config.dit.layers + 1) * 2 * width**2


# --- Stage II ------------------------------------------------------------------------------------------------------------


def intent_operations(backbone: BackboneConfig, policy: PolicyConfig, sizes: Sequence[Size], length: int) -> int:
    """Of one observation of `length` tokens, `sizes` its pictures, up to block k."""
    decoder = replace(backbone.decoder, layers=policy.intent_block)
    return vision_operations(backbone.vision, sizes) + decoder_operations(decoder, 1, length, 0)


def learning_operations(policy: PolicyConfig, tokens: int) -> int:
    """Of one moment of `tokens` of intent: forward and backward, and the slow bridge's look at the future."""
    bridge = bridge_operations(policy, 1, tokens)
    return 3 * (bridge + policy.objective.draws * step_operations(policy, 1)) + bridge
