"""How much a phase asks of a machine at least: parameters, operations, bytes. And what machines can give.

An operation is a multiplication or an addition, so a product of [m, k] and [k, n] has 2 m k n. Only products are counted, causal
attention without what it masks, and nothing for padding or recomputation: what is computed beyond that is loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.weights.names import table

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
