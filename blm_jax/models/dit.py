"""The diffusion transformer: [state | future tokens | actions], steered by the bridge's tokens and by time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blm_jax.config import DiTConfig, Remat
from blm_jax.mesh import constrain
from blm_jax.models.layers import LayerNorm, Linear, scan, sinusoid, stack
from blm_jax.models.transformer import Dropout, Layer, Memory, Modulation, keep_all


class Clock(NamedTuple):
    """Times of a sequence. Tokens have one of a few: that of the noise, or that of steps which are given already."""

    embedded: jax.Array  # [rows or 1, times, width]
    which: jax.Array  # [rows or 1, tokens] int32

    def of_tokens(self, values: jax.Array) -> jax.Array:
        """values [rows or 1, times, n], computed once a time -> [rows or 1, tokens, n]."""
        return jnp.take_along_axis(values, self.which[..., None], axis=1)


class TimeEmbedding(nnx.Module):
    def __init__(self, config: DiTConfig, buckets: int, *, rngs: nnx.Rngs):
        self.features = config.time_features
        self.buckets = buckets
        self.inner = Linear([config.time_features], [config.width], (None, "embed"), bias=True, rngs=rngs)
        self.outer = Linear([config.width], [config.width], ("embed", "ffn"), bias=True, rngs=rngs)

    def __call__(self, time: jax.Array) -> jax.Array:
        """time [...] in [0, 1] -> [..., width]."""
        bucket = jnp.floor(time * self.buckets)
        return self.outer(jax.nn.silu(self.inner(sinusoid(bucket, self.features, longest=1e4))))


class DiTLayer(nnx.Module):
    def __init__(self, config: DiTConfig, memory_width: int, *, rngs: nnx.Rngs):
        width = config.width
        # Time is silent at first: what need not depend on it is learned once, and not for each time anew.
        self.modulate = Linear([width], [2, width], ("embed", None, "ffn"), bias=True, scale=0.0, rngs=rngs)
        sizes = width, config.heads, config.head_dim, config.ffn, memory_width
        self.layer = Layer(*sizes, modulated=True, norms=config.norms, rngs=rngs)

    def modulation(self, clock: Clock, dtype: jnp.dtype) -> Modulation:
        made = self.modulate(jax.nn.silu(clock.embedded)).astype(dtype)
        return Modulation(clock.of_tokens(made[:, :, 0]), clock.of_tokens(made[:, :, 1]))


class DiTPair(nnx.Module):
    def __init__(self, config: DiTConfig, memory_width: int, *, rngs: nnx.Rngs):
        self.cross = DiTLayer(config, memory_width, rngs=rngs)
        self.own = DiTLayer(config, config.width, rngs=rngs)

    def __call__(self, x: jax.Array, memory: Memory, segments: jax.Array, clock: Clock, drops: tuple[Dropout, Dropout]) -> jax.Array:
        x = self.cross.layer.to_memory(x, memory, modulation=self.cross.modulation(clock, x.dtype), drop=drops[0])
        x = self.own.layer.to_itself(x, segments, modulation=self.own.modulation(clock, x.dtype), drop=drops[1])
        return constrain(x, ("batch", "length", "width"))


class DiT(nnx.Module):
    def __init__(self, config: DiTConfig, memory_width: int, buckets: int, *, remat: Remat, rngs: nnx.Rngs):
        self.config = config
        self.remat: Remat = remat
        self.time = TimeEmbedding(config, buckets, rngs=rngs)
        self.pairs = stack(lambda rngs: DiTPair(config, memory_width, rngs=rngs), config.layers // 2, rngs)
        self.norm = LayerNorm(config.width, affine=False, normalises=config.norms)
        self.modulate = Linear([config.width], [2, config.width], ("embed", None, "ffn"), bias=True, scale=0.0, rngs=rngs)

    def remember(self, memory: jax.Array) -> Memory:
        """Keys and values of all cross-attention layers, [pairs, rows, heads, memory, head_dim]: made once an observation."""
        return scan(lambda none, pair: (none, pair.cross.layer.remember(memory)), None, self.pairs)[1]

    def __call__(
        self, x: jax.Array, memory: Memory, segments: jax.Array, clock: Clock, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x [rows, tokens, width] -> the same, and what it was after the tapped layer. `keys` [rows] turn dropout on."""
        tap = self.config.tap // 2 - 1

        def body(
            carry: tuple[jax.Array, jax.Array], pair: DiTPair, memory: Memory, number: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, tapped = carry
            drops = (keep_all, keep_all) if keys is None else (self._dropout(keys, 2 * number), self._dropout(keys, 2 * number + 1))
            x = pair(x, memory, segments, clock, drops)
            return (x, jnp.where(number == tap, x, tapped)), None

        numbers = jnp.arange(self.config.layers // 2)
        (x, tapped), _ = scan(body, (x, jnp.zeros_like(x)), self.pairs, xs=(memory, numbers), remat=self.remat)
        made = self.modulate(jax.nn.silu(clock.embedded)).astype(x.dtype)
        return self.norm(x) * (1 + clock.of_tokens(made[:, :, 0])) + clock.of_tokens(made[:, :, 1]), tapped

    def _dropout(self, keys: jax.Array, layer: jax.Array) -> Dropout:
        """Noise by row: a row's own key decides, wherever it is computed."""
        keep = 1 - self.config.dropout

        def drop(x: jax.Array, place: int) -> jax.Array:
            kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2 * layer + place), keep, x.shape[1:]))(keys)
            return jnp.where(kept, x / keep, 0).astype(x.dtype)

        return drop
