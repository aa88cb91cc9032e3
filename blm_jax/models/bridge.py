"""The intent bridge: a Perceiver that compresses hidden states of the backbone, however many, to a few tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from blm_jax.batch import IntentRows
from blm_jax.config import BridgeConfig, Dtype
from blm_jax.mesh import constrain
from blm_jax.models.layers import TOKEN_SCALE, LayerNorm, Linear, param, scan, sinusoid, stack
from blm_jax.models.transformer import Layer

PLACE_FEATURES = 64  # for each of row, column and time


class Places(nnx.Module):
    """What a key knows of where it was seen. Learned for cameras; waves for the rest, so that any grid has its places."""

    def __init__(self, config: BridgeConfig, *, rngs: nnx.Rngs):
        self.cameras = param(TOKEN_SCALE * jax.random.normal(rngs.params(), (config.cameras + 1, config.width)), (None, "embed"))
        self.project = Linear([3 * PLACE_FEATURES], [config.width], (None, "embed"), bias=False, rngs=rngs)

    def __call__(self, places: jax.Array, dtype: Dtype) -> jax.Array:
        """places [rows, tokens, 4] -> [rows, tokens, width]. Camera 0 is text, which has no place."""
        camera = places[..., 0]
        waves = jnp.where(camera[..., None, None] > 0, sinusoid(places[..., 1:], PLACE_FEATURES, longest=1e3), 0)
        table = constrain(self.cameras[...].astype(dtype), (None, None))  # whole on a device: looked up by rows that are divided
        return table[camera] + self.project(waves.reshape(*camera.shape, -1).astype(dtype))


class BridgeBlock(nnx.Module):
    def __init__(self, config: BridgeConfig, *, rngs: nnx.Rngs):
        sizes = config.width, config.heads, config.width // config.heads, config.ffn, config.width
        self.cross = Layer(*sizes, modulated=False, rngs=rngs)
        self.own = Layer(*sizes, modulated=False, rngs=rngs)

    def __call__(self, x: jax.Array, intent: jax.Array, seen: jax.Array) -> jax.Array:
        x = self.cross.to_memory(x, self.cross.remember(intent), seen)
        return self.own.to_itself(x, jnp.ones(x.shape[:2], jnp.int32))


class Bridge(nnx.Module):
    def __init__(self, config: BridgeConfig, intent_width: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.dtype: Dtype = dtype
        self.queries = param(TOKEN_SCALE * jax.random.normal(rngs.params(), (config.queries, config.width)), (None, "embed"))
        # Hidden states of a deep decoder have a few dimensions far larger than the rest: without a norm they are all a key has.
        self.intent_norm = LayerNorm(intent_width)
        self.project = Linear([intent_width], [config.width], (None, "embed"), bias=True, rngs=rngs)
        self.places = Places(config, rngs=rngs) if config.places else None
        self.blocks = stack(lambda rngs: BridgeBlock(config, rngs=rngs), config.blocks, rngs)
        self.norm = LayerNorm(config.width)

    def __call__(self, intent: IntentRows) -> jax.Array:
        """-> [rows, queries, width]. Padding is masked, so that its length changes nothing."""
        # where and not the mask alone: what stands in padding may be anything, NaN too.
        hidden = jnp.where(intent.mask[..., None], intent.hidden, 0).astype(self.dtype)
        keys = self.project(self.intent_norm(hidden))
        if self.places is not None:
            keys = keys + self.places(intent.places, self.dtype)
        queries = self.queries[...].astype(self.dtype)
        x = constrain(jnp.broadcast_to(queries, (keys.shape[0], *queries.shape)), ("batch", "length", "width"))
        x, _ = scan(lambda x, block: (block(x, keys, intent.mask), None), x, self.blocks)
        return self.norm(x)
