"""The layer that bridge and DiT are made of: attention, to a memory or to itself, then a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from blm_jax.models.attention import attend, attend_memory
from blm_jax.models.layers import LayerNorm, Linear

COLUMNS, ROWS = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")

Dropout = Callable[[jax.Array, int], jax.Array]  # values, and which of a layer's places it is


def keep_all(x: jax.Array, place: int) -> jax.Array:
    return x


class Memory(NamedTuple):
    """What is attended to, projected once: [rows, heads, memory, head_dim] each."""

    keys: jax.Array
    values: jax.Array


class Modulation(NamedTuple):
    scale: jax.Array
    shift: jax.Array


class Layer(nnx.Module):
    """`modulated` layers take scale and shift of their first norm from outside (AdaLN). Without `norms` none of them normalises."""

    def __init__(
        self, width: int, heads: int, head_dim: int, ffn: int, memory_width: int, *, modulated: bool, norms: bool = True, rngs: nnx.Rngs
    ):
        self.norm = LayerNorm(width, affine=not modulated, normalises=norms)
        self.q = Linear([width], [heads, head_dim], COLUMNS, bias=True, rngs=rngs)
        self.k = Linear([memory_width], [heads, head_dim], COLUMNS, bias=True, rngs=rngs)
        self.v = Linear([memory_width], [heads, head_dim], COLUMNS, bias=True, rngs=rngs)
        self.out = Linear([heads, head_dim], [width], ROWS, bias=True, rngs=rngs)
        self.ffn_norm = LayerNorm(width, normalises=norms)
        self.up = Linear([width], [ffn], ("embed", "ffn"), bias=True, rngs=rngs)
        self.down = Linear([ffn], [width], ("ffn", "embed"), bias=True, rngs=rngs)

    def remember(self, memory: jax.Array) -> Memory:
        """memory [rows, tokens, memory_width], to be attended to as often as wanted."""
        return Memory(self.k(memory).swapaxes(1, 2), self.v(memory).swapaxes(1, 2))

    def to_memory(
        self, x: jax.Array, memory: Memory, seen: jax.Array | None = None, modulation: Modulation | None = None, drop: Dropout = keep_all
    ) -> jax.Array:
        """Attend to a memory. x [memory rows * n, tokens, width]: n rows that follow each other share a row of the memory."""
        rows = memory.keys.shape[0]
        q = self.q(self._normed(x, modulation))
        attended = attend_memory(q.reshape(rows, -1, *q.shape[2:]), memory.keys, memory.values, seen)
        return self._finish(x, attended.reshape(q.shape), drop)

    def to_itself(self, x: jax.Array, segments: jax.Array, modulation: Modulation | None = None, drop: Dropout = keep_all) -> jax.Array:
        h = self._normed(x, modulation)
        return self._finish(x, attend(self.q(h), self.k(h), self.v(h), segments, causal=False), drop)

    def _normed(self, x: jax.Array, modulation: Modulation | None) -> jax.Array:
        h = self.norm(x)
        return h if modulation is None else h * (1 + modulation.scale) + modulation.shift

    def _finish(self, x: jax.Array, attended: jax.Array, drop: Dropout) -> jax.Array:
        x = x + drop(self.out(attended), 0)
        return x + drop(self.down(jax.nn.gelu(self.up(self.ffn_norm(x)), approximate=True)), 1)
