"""The text decoder: embeddings in, hidden states or logits out; the same blocks with a cache for generation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blm_jax.config import AttentionName, ComputeConfig, DecoderConfig
from blm_jax.errors import RequestError
from blm_jax.mesh import constrain
from blm_jax.models.attention import attend, attend_memory
from blm_jax.models.layers import WORD_SCALE, Linear, RMSNorm, param, scan, stack, swiglu, unstack
from blm_jax.models.rope import Rotary, rotate, text_rotary

ACTIVATIONS = ("batch", "length", "width")
CACHE = ("batch", "kv_heads", "length", "head_dim")


class Embedding(nnx.Module):
    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = param(WORD_SCALE * jax.random.normal(rngs.params(), (vocab, width)), ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Whole rows on a device, or looking words up would have to move activations from one axis to another.
        return constrain(self.embedding[...], ("vocab", None))[tokens]


class DecoderBlock(nnx.Module):
    def __init__(self, config: DecoderConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        width, dim = config.width, config.head_dim
        self.attention: AttentionName = compute.attention
        self.attn_norm = RMSNorm(width, config.norm_eps)
        self.q = Linear([width], [config.heads, dim], ("embed", "heads", "head_dim"), bias=True, rngs=rngs)
        self.k = Linear([width], [config.kv_heads, dim], ("embed", "kv_heads", "head_dim"), bias=True, rngs=rngs)
        self.v = Linear([width], [config.kv_heads, dim], ("embed", "kv_heads", "head_dim"), bias=True, rngs=rngs)
        self.out = Linear([config.heads, dim], [width], ("heads", "head_dim", "embed"), bias=False, rngs=rngs)
        self.ffn_norm = RMSNorm(width, config.norm_eps)
        self.gate = Linear([width], [config.ffn], ("embed", "ffn"), bias=False, rngs=rngs)
        self.up = Linear([width], [config.ffn], ("embed", "ffn"), bias=False, rngs=rngs)
        self.down = Linear([config.ffn], [width], ("ffn", "embed"), bias=False, rngs=rngs)

    def project(self, x: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = self.attn_norm(x)
        return rotate(self.q(h), rotary), rotate(self.k(h), rotary), self.v(h)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = x + self.out(attended)
        x = x + swiglu(self.ffn_norm(x), self.gate, self.up, self.down)
        return constrain(x, ACTIVATIONS)

    def __call__(
        self, x: jax.Array, rotary: Rotary, segments: jax.Array, *, packed: bool = True
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v = self.project(x, rotary)
        attended = attend(q, k, v, segments, causal=True, packed=packed, implementation=self.attention)
        return self.finish(x, attended), (k, v)


class KeyValue(NamedTuple):
    """What one block remembers, [rows, kv_heads, room, head_dim] each."""

    keys: jax.Array
    values: jax.Array


Cache = tuple[KeyValue, ...]


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.embed = Embedding(config.vocab, config.width, rngs=rngs)
        self.blocks: DecoderBlock | nnx.List[DecoderBlock] = stack(
            lambda rngs: DecoderBlock(config, compute, rngs=rngs), config.layers, rngs
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else Linear([config.width], [config.vocab], ("embed", "vocab"), bias=False, rngs=rngs)

    def hidden(self, x: jax.Array, positions: jax.Array, segments: jax.Array, blocks: int | None = None, *, kept: int = 0) -> jax.Array:
        """Hidden states after `blocks` blocks (all of them by default), before the final norm. What lies above never runs. Of the first
        `kept` blocks, and of what lies below, nothing is learned.
        """
        if blocks is not None and not 0 <= blocks <= self.config.layers:
            raise RequestError(f"block {blocks} is none of the decoder's: it has {self.config.layers}")
        rotary = text_rotary(positions, self.config)

        def body(x: jax.Array, block: DecoderBlock) -> tuple[jax.Array, None]:
            return block(x, rotary, segments)[0], None

        if isinstance(self.blocks, nnx.List):  # taken apart for serving
            for block in unstack(self.blocks)[:blocks]:
                x, _ = body(x, block)
            return x
        if kept:
            graph, state = nnx.split(self.blocks)
            below = nnx.merge(graph, jax.lax.stop_gradient(state))
            x = scan(body, jax.lax.stop_gradient(x), below, blocks=kept)[0]
        return scan(body, x, self.blocks, remat=self.compute.remat, begin=kept, blocks=blocks)[0]

    def head_kernel(self) -> jax.Array:
        """[width, vocab]"""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """Float32 whatever the compute type: bfloat16 would make ties of the likeliest tokens."""
        logits = jnp.matmul(self.norm(x), self.head_kernel().astype(x.dtype), preferred_element_type=jnp.float32)
        return constrain(logits, ("batch", "length", "vocab"))  # or a mesh would gather the head, and not its few products

    def prefill(self, x: jax.Array, positions: jax.Array, segments: jax.Array, room: int) -> tuple[jax.Array, Cache]:
        """-> hidden states, and a cache with `room` places of which the prompt fills the first."""
        rotary = text_rotary(positions, self.config)
        cache = []
        for block in unstack(self.blocks):
            x, (k, v) = block(x, rotary, segments, packed=False)
            grow = ((0, 0), (0, 0), (0, room - k.shape[1]), (0, 0))
            cache.append(KeyValue(*(constrain(jnp.pad(z.swapaxes(1, 2), grow), CACHE) for z in (k, v))))
        return x, tuple(cache)

    def decode(self, x: jax.Array, positions: jax.Array, cache: Cache, at: jax.Array, seen: jax.Array) -> tuple[jax.Array, Cache]:
        """One token a row, written at place `at`. x [rows, 1, width], positions [rows, 3, 1], seen [rows, room] holds `at` too.

        A loop over layers and not a scan: a scan would copy each layer's weights out of the stack before using them once.
        """
        rotary = text_rotary(positions, self.config)
        grown = []
        for block, (keys, values) in zip(unstack(self.blocks), cache, strict=True):
            q, k, v = block.project(x, rotary)
            keys = constrain(jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), at, axis=2), CACHE)
            values = constrain(jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), at, axis=2), CACHE)
            x = block.finish(x, attend_memory(q, keys, values, seen))
            grown.append(KeyValue(keys, values))
        return x, tuple(grown)
