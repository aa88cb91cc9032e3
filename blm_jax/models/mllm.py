"""The backbone whole: pictures and tokens in; hidden states, logits or a cache out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from blm_jax.batch import Batch, IntentRows, Prompts
from blm_jax.config import BackboneConfig, ComputeConfig, LoraConfig
from blm_jax.mesh import constrain
from blm_jax.models.decoder import ACTIVATIONS, Cache, Decoder
from blm_jax.models.layers import Adapter, around, shapes_of, unstack
from blm_jax.models.vision import VisionTower


class Mllm(nnx.Module):
    """Qwen2.5-VL."""

    def __init__(self, config: BackboneConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        self.vision = VisionTower(config.vision, compute, rngs=rngs)
        self.decoder = Decoder(config.decoder, compute, rngs=rngs)

    def embed(self, batch: Batch) -> jax.Array:
        """-> [rows, length, width]: word embeddings, visual tokens in their slots."""
        x = self.decoder.embed(batch.tokens).astype(self.compute.dtype)
        if batch.vision is not None:
            x = place(x, self.vision(batch.vision), batch.slots, batch.vision.groups)
        return constrain(x, ACTIVATIONS)

    def hidden(self, batch: Batch, blocks: int | None = None, *, kept: int = 0) -> jax.Array:
        """Hidden states after `blocks` blocks (all by default), before the final norm; nothing is learned of the first `kept`, or below."""
        return self.decoder.hidden(self.embed(batch), batch.positions, batch.segments, blocks, kept=kept)

    def heard(self, batch: Batch, *, kept: int = 0) -> jax.Array:
        """What the head reads, [rows, length, width]: the logits of training are made of it in parts."""
        return self.decoder.norm(self.hidden(batch, kept=kept))

    def intent(self, prompts: Prompts, blocks: int) -> IntentRows:
        hidden = constrain(self.hidden(prompts.batch, blocks), ("batch", "length", "width"))
        return IntentRows(hidden, prompts.mask, prompts.places)

    def __call__(self, batch: Batch) -> jax.Array:
        """-> logits [rows, length, vocab], float32."""
        return self.decoder.logits(self.hidden(batch))

    def prefill(self, batch: Batch, last: jax.Array, room: int) -> tuple[jax.Array, Cache]:
        """-> logits [rows, vocab] at place `last` of each row, and the cache."""
        x, cache = self.decoder.prefill(self.embed(batch), batch.positions, batch.segments, room)
        return self.decoder.logits(jnp.take_along_axis(x, last[:, None, None], axis=1))[:, 0], cache

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: Cache, at: jax.Array, seen: jax.Array) -> tuple[jax.Array, Cache]:
        """One token a row: tokens and positions [rows] -> logits [rows, vocab]."""
        x = self.decoder.embed(tokens[:, None]).astype(self.compute.dtype)
        x, cache = self.decoder.decode(x, jnp.broadcast_to(positions[:, None, None], (len(tokens), 3, 1)), cache, at, seen)
        return self.decoder.logits(x)[:, 0], cache


def place(x: jax.Array, visual: jax.Array, slots: jax.Array, groups: int) -> jax.Array:
    """Put visual tokens [vision rows, tokens, width] into their slots of x [rows, length, width], group by group."""
    rows, length, width = x.shape
    visual = visual.reshape(groups, -1, width)
    slots = slots.reshape(groups, -1)
    chosen = jnp.take_along_axis(visual, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where((slots >= 0)[..., None], chosen, x.reshape(groups, -1, width)).reshape(rows, length, width)


def adapted(model: Mllm, lora: LoraConfig | None, seed: int = 0) -> Mllm:
    if lora is not None:
        rngs = nnx.Rngs(seed)
        for name in lora.targets:
            linear = getattr(model.decoder.blocks, name)
            linear.adapter = Adapter(linear, lora.rank, lora.alpha, rngs=rngs)
    return model


def abstract_params(
    config: BackboneConfig, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None, lora: LoraConfig | None = None
) -> dict[str, Any]:
    """Shapes of all parameters as a nested dict, with their shardings on a mesh; nothing is computed."""
    return shapes_of(lambda: adapted(Mllm(config, ComputeConfig(), rngs=nnx.Rngs(0)), lora), dtype, mesh)


def with_params(
    config: BackboneConfig, compute: ComputeConfig, params: dict[str, Any], *, apart: bool = False, lora: LoraConfig | None = None
) -> Mllm:
    """The model around parameters that exist already; `apart` where the decoder's layers are not stacked but numbered."""

    def make() -> Mllm:
        model = adapted(Mllm(config, compute, rngs=nnx.Rngs(0)), lora)
        if apart:
            model.decoder.blocks = nnx.List(unstack(model.decoder.blocks))
        return model

    return around(make, params)


def random_params(config: BackboneConfig, dtype: DTypeLike, mesh: Mesh | None, seed: int) -> dict[str, Any]:
    """Parameters as they are before any training, made where they live."""

    def make() -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.state(Mllm(config, ComputeConfig(), rngs=nnx.Rngs(seed)), nnx.Param))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    shardings = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, dtype, mesh))
    return jax.jit(make, out_shardings=shardings)()
