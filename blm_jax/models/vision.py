"""The vision tower: rows of patches in, visual tokens out."""

from __future__ import annotations

from itertools import accumulate, groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blm_jax.batch import VisionRows
from blm_jax.config import AttentionName, ComputeConfig, VisionConfig
from blm_jax.mesh import constrain
from blm_jax.models.attention import attend
from blm_jax.models.layers import Linear, RMSNorm, scan, stack, swiglu
from blm_jax.models.rope import Rotary, rotate, vision_rotary

NORM_EPS = 1e-6  # not in any configuration file of the Hub


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        width, heads, dim = config.width, config.heads, config.head_dim
        self.window_patches = config.window_patches
        self.attention: AttentionName = compute.attention
        self.attn_norm = RMSNorm(width, NORM_EPS)
        self.qkv = Linear([width], [3, heads, dim], ("embed", None, "heads", "head_dim"), bias=True, rngs=rngs)
        self.out = Linear([heads, dim], [width], ("heads", "head_dim", "embed"), bias=True, rngs=rngs)
        self.ffn_norm = RMSNorm(width, NORM_EPS)
        self.gate = Linear([width], [config.ffn], ("embed", "ffn"), bias=True, rngs=rngs)
        self.up = Linear([width], [config.ffn], ("embed", "ffn"), bias=True, rngs=rngs)
        self.down = Linear([config.ffn], [width], ("ffn", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, rotary: Rotary, rows: VisionRows, *, full: bool) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(self.attn_norm(x)), -3, 0)
        q, k = rotate(q, rotary), rotate(k, rotary)
        segments = rows.frames if full else rows.windows
        if not full:  # every window lies in a slot of its own length: attention within slots, as a plain batch
            slots = (-1, self.window_patches)
            q, k, v = (z.reshape(*slots, *z.shape[2:]) for z in (q, k, v))
            segments = segments.reshape(slots)
        y = attend(q, k, v, segments, causal=False, implementation=self.attention)
        x = x + self.out(y.reshape(*x.shape[:2], *y.shape[2:]))
        return x + swiglu(self.ffn_norm(x), self.gate, self.up, self.down)


class Merger(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.cell = config.merge**2
        width = config.width * self.cell
        self.norm = RMSNorm(config.width, NORM_EPS)
        self.inner = Linear([width], [width], ("embed", "ffn"), bias=True, rngs=rngs)
        self.outer = Linear([width], [config.out_width], ("ffn", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, patches, width = x.shape
        cells = self.norm(x).reshape(rows, patches // self.cell, self.cell * width)
        return self.outer(jax.nn.gelu(self.inner(cells), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.patch_embed = Linear([config.patch_values], [config.width], (None, "embed"), bias=False, rngs=rngs)
        self.blocks = stack(lambda rngs: VisionBlock(config, compute, rngs=rngs), config.layers, rngs)
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, rows: VisionRows) -> jax.Array:
        """-> [rows, patches / merge^2, out_width], visual tokens in the order of their patches."""
        rotary = vision_rotary(rows.places, self.config)
        x = self.patch_embed(_values(rows).astype(self.compute.dtype))
        x = constrain(x, ("batch", "length", "width"))
        pattern = [i in self.config.full_attention_layers for i in range(self.config.layers)]
        period = _period(pattern)

        def group(x: jax.Array, layers: VisionBlock) -> tuple[jax.Array, None]:
            for full, run in _runs(layers, pattern[:period]):

                def body(x: jax.Array, layer: VisionBlock, full: bool = full) -> tuple[jax.Array, None]:
                    return constrain(layer(x, rotary, rows, full=full), ("batch", "length", "width")), None

                x, _ = scan(body, x, run, remat=self.compute.remat)
            return x, None

        x, _ = scan(group, x, _periods(self.blocks, period), gather=False)
        return self.merger(x)


def _values(rows: VisionRows) -> jax.Array:
    """[rows, patches, values], normalised."""
    if rows.levels is None:
        return rows.patches
    each = rows.patches.shape[-1] // len(rows.levels)
    scale, offset = np.repeat(np.array(rows.levels, np.float32), each, axis=0).T
    return rows.patches.astype(jnp.float32) * scale + offset


def _period(pattern: list[bool]) -> int:
    """The shortest stretch of layers whose repetition is the whole: 8 for every eighth layer with full attention.

    Scanning such stretches compiles each kind of layer once and needs no branch at run time.
    """
    count = len(pattern)
    return next(p for p in range(1, count + 1) if count % p == 0 and pattern == pattern[:p] * (count // p))


def _periods(blocks: VisionBlock, period: int) -> VisionBlock:
    graph, state = nnx.split(blocks)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), state))


def _runs(blocks: VisionBlock, pattern: list[bool]) -> list[tuple[bool, VisionBlock]]:
    """Neighbouring layers of one kind. A split, since its transpose joins the gradients in one step."""
    kinds = [(full, len(list(run))) for full, run in groupby(pattern)]
    bounds = list(accumulate(count for _, count in kinds))[:-1]
    graph, state = nnx.split(blocks)
    leaves, tree = jax.tree.flatten(state)
    parts = [jnp.split(leaf, bounds) for leaf in leaves]
    return [(full, nnx.merge(graph, tree.unflatten([part[i] for part in parts]))) for i, (full, _) in enumerate(kinds)]
