"""What training makes small."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """logits [rows, length, vocab], targets and weights [rows, length] -> the weighted mean over tokens; 0 where no token counts."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1.0)
