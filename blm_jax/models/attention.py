"""One door to attention: the same meaning whatever computes it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from blm_jax.config import AttentionName
from blm_jax.errors import RequestError
from blm_jax.mesh import per_device, platform

TILE = 128
UNROLLED = 4096  # rows up to this long are cut into blocks while tracing, which skips what is masked
LONG_BLOCK = 256
MASKED = -1e30  # finite, so that a row with nothing to see gives an average and not NaN


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    packed: bool = True,
    implementation: AttentionName = "auto",
) -> jax.Array:
    """q [rows, length, heads, dim], k and v [rows, length, kv_heads, dim], segments [rows, length] -> like q.

    A token sees those of its own segment; of these, none that follow it where `causal`. Not `packed` promises that each row
    is one segment and then padding, which saves some kernels a mask. What padding gets is of no meaning.
    """
    match choose(implementation, q.shape[1], q.shape[3], q.dtype):
        case "splash":
            return _splash(q, k, v, segments, causal=causal)
        case "cudnn":
            return _cudnn(q, k, v, segments, causal=causal, packed=packed)
    return _xla(q, k, v, segments, causal=causal)


def choose(wanted: AttentionName, length: int, dim: int, dtype: jnp.dtype) -> AttentionName:
    """The kernel of the platform the program is for. A window fits one tile: there a kernel gains nothing on a plain product."""
    if length <= TILE or wanted == "xla":
        return "xla"
    fits_cudnn = dtype == jnp.bfloat16 and dim % 8 == 0 and dim <= 128
    if wanted == "auto":
        if platform() == "tpu":
            return "splash"
        return "cudnn" if platform() == "gpu" and fits_cudnn else "xla"
    if wanted == "cudnn" and not fits_cudnn:
        raise RequestError(f"compute.attention=cudnn needs bfloat16 and heads of at most 128 in eights, not {dtype} and {dim}: take xla")
    return wanted


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool) -> jax.Array:
    """Blocks of queries, each one plain batched product against the keys it can see.

    Causal blocks stop at their last query, so what lies above the diagonal is skipped but for a corner of each block; query
    heads of one key head are folded into rows of the product. On CPU several times faster than one five-axis einsum.
    """
    rows, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(rows, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4) * dim**-0.5  # [rows, kv_heads, group, length, dim]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [rows, kv_heads, length, dim]

    def attended(part: jax.Array, places: jax.Array, own: jax.Array, end: int) -> jax.Array:
        """Queries at `places` [block], of segments `own` [rows, block], against keys up to `end`; part is cut from q."""
        seen = own[:, :, None] == segments[:, None, :end]
        if causal:
            seen &= places[:, None] >= jnp.arange(end)
        scores = jnp.einsum("bhqd,bhsd->bhqs", part.reshape(rows, kv_heads, -1, dim), k[:, :, :end], preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores.reshape(*part.shape[:-1], end), MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqs,bhsd->bhqd", weights.reshape(rows, kv_heads, -1, end), v[:, :, :end]).reshape(part.shape)

    if length <= UNROLLED:
        block = max(TILE, -(-length // 8))
        cuts = [(start, min(start + block, length)) for start in range(0, length, block)]
        parts = [attended(q[:, :, :, i:j], jnp.arange(i, j), segments[:, i:j], j if causal else length) for i, j in cuts]
        out = jnp.concatenate(parts, axis=3)
    else:
        # One block at a time, its scores made again in the backward pass: memory grows with the length and not with its square.
        count = -(-length // LONG_BLOCK)
        spare = count * LONG_BLOCK - length
        queries = jnp.pad(q, ((0, 0),) * 3 + ((0, spare), (0, 0))).reshape(*q.shape[:3], count, LONG_BLOCK, dim)
        own = jnp.pad(segments, ((0, 0), (0, spare))).reshape(rows, count, LONG_BLOCK)
        places = jnp.arange(count * LONG_BLOCK).reshape(count, LONG_BLOCK)
        one = jax.checkpoint(lambda x: attended(x[0], x[1], x[2], length))
        out = jax.lax.map(one, (jnp.moveaxis(queries, 3, 0), places, jnp.moveaxis(own, 1, 0)))
        out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:3], -1, dim)[:, :, :, :length]
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool) -> jax.Array:
    """The TPU kernel, each device on its own rows and heads. Lengths and head sizes are padded to tiles of 128."""
    length, dim = q.shape[1], q.shape[3]
    spare = ((0, 0), (0, -length % TILE), (0, 0), (0, -dim % TILE))
    q, k, v = (jnp.pad(x, spare).swapaxes(1, 2) for x in (q * dim**-0.5, k, v))  # [rows, heads, length, dim]
    segments = jnp.pad(segments, spare[:2], constant_values=-1)  # a segment of its own: seen by nothing real

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        shape = (q.shape[2], k.shape[2])
        mask = splash_mask.CausalMask(shape) if causal else splash_mask.FullMask(shape)
        block = next(size for size in (512, 384, 256, 128) if q.shape[2] % size == 0)
        blocks: dict[str, Any] = {field.name: block for field in fields(splash.BlockSizes) if field.name.startswith("block")}
        heads = splash_mask.MultiHeadMask([mask] * q.shape[1])
        kernel: Any = splash.make_splash_mha(
            heads, block_sizes=splash.BlockSizes(**blocks), head_shards=1, q_seq_shards=1, interpret=platform() == "cpu"
        )
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(q, k, v, segments)

    queries, keys = ("batch", "heads", "length", "head_dim"), ("batch", "kv_heads", "length", "head_dim")
    out = per_device(local, [queries, keys, keys, ("batch", "length")], like=0)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :length, :, :dim]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool, packed: bool) -> jax.Array:
    if packed:
        seen = (segments[:, :, None] == segments[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=causal, implementation="cudnn")
    lengths = jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)  # a row that only fills the mesh sees itself
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def attend_memory(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Few queries against keys made before: a cache, a Perceiver's inputs, a condition.

    q [rows, queries, heads, dim], keys and values [rows, kv_heads, memory, dim], seen [rows, memory] -> like q.
    """
    rows, queries, heads, dim = q.shape
    kv_heads = keys.shape[1]
    q = q.reshape(rows, queries, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4) * dim**-0.5
    scores = jnp.einsum("bhqd,bhsd->bhqs", q.reshape(rows, kv_heads, -1, dim), keys, preferred_element_type=jnp.float32)
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    attended = jnp.einsum("bhqs,bhsd->bhqd", weights, values).reshape(q.shape)
    return attended.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, dim)
