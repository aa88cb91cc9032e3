"""One door to attention: the same meaning whatever computes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blm_jax.config import AttentionName

MASKED = -1e30  # finite, so that a row with nothing to see gives an average and not NaN


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool, implementation: AttentionName = "auto") -> jax.Array:
    """q [rows, length, heads, dim], k and v [rows, length, kv_heads, dim], segments [rows, length] -> like q.

    A token sees those of its own segment; of these, none that follow it where `causal`.
    """
    return _xla(q, k, v, segments, causal=causal)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool) -> jax.Array:
    """Blocks of queries, each one plain batched product against all the keys it can see.

    Causal blocks stop at their last query, so what lies above the diagonal is skipped but for a corner of each block; query
    heads of one key head are folded into the rows of the product. Several times faster on CPU than one five-axis einsum.
    """
    rows, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(rows, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4) * dim**-0.5  # [rows, kv_heads, group, length, dim]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [rows, kv_heads, length, dim]
    block = max(128, -(-length // 8))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        end = stop if causal else length
        seen = segments[:, start:stop, None] == segments[:, None, :end]
        if causal:
            seen &= jnp.arange(start, stop)[:, None] >= jnp.arange(end)
        part = q[:, :, :, start:stop]
        scores = jnp.einsum("bhqd,bhsd->bhqs", part.reshape(rows, kv_heads, -1, dim), k[:, :, :end], preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores.reshape(*part.shape[:-1], end), MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        attended = jnp.einsum("bhqs,bhsd->bhqd", weights.reshape(rows, kv_heads, -1, end), v[:, :, :end])
        outputs.append(attended.reshape(part.shape))
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)
