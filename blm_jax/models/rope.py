"""Rotary embeddings: three-axis positions of the decoder, two-axis places of the vision tower."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.config import DecoderConfig, VisionConfig

VISION_THETA = 1e4  # not in any configuration file of the Hub


class Rotary(NamedTuple):
    """Float32 whatever the compute type: bfloat16 cannot tell neighbouring positions apart past a few hundred."""

    cos: jax.Array  # [..., head_dim / 2]
    sin: jax.Array


def _frequencies(theta: float, count: int) -> np.ndarray:
    """Rounded as the reference rounds, before the inversion: at position 100,000 the last bit of a frequency turns logits."""
    return 1 / (theta ** (np.arange(count) / count)).astype(np.float32)


def text_rotary(positions: jax.Array, config: DecoderConfig) -> Rotary:
    """positions [rows, 3, length] -> angles [rows, length, head_dim / 2]; each frequency follows one of the three axes."""
    half = config.head_dim // 2
    frequencies = _frequencies(config.rope_theta, half)
    axis = np.concatenate([np.full(count, i % 3) for i, count in enumerate(config.mrope_section)])
    angles = positions.astype(jnp.float32)[:, axis].swapaxes(1, 2) * frequencies
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def vision_rotary(places: jax.Array, config: VisionConfig) -> Rotary:
    """places [rows, patches, 2] -> angles [rows, patches, head_dim / 2]: the first half by row, the second by column."""
    quarter = config.head_dim // 4
    frequencies = _frequencies(VISION_THETA, quarter)
    angles = (places.astype(jnp.float32)[..., None] * frequencies).reshape(*places.shape[:-1], 2 * quarter)
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """x [..., length, heads, head_dim], pairs a half apart."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotary.cos[..., None, :], rotary.sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
