"""The programs of `blm generate`, lowered for a mesh: the pass over the prompts, and a turn of the loop that decodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from blm_jax import mesh as meshes
from blm_jax.batch import Batch
from blm_jax.config import Experiment
from blm_jax.counts import decoder_operations, vision_operations
from blm_jax.infer.generate import Stops, bucket, extend, prefill
from blm_jax.infer.sampling import method_of
from blm_jax.models.decoder import CACHE
from blm_jax.models.mllm import abstract_params, with_params
from blm_jax.plan import rows
from blm_jax.plan.programs import held_by, rows_on
from blm_jax.plan.report import Program

PROMPT = 1024  # tokens, a picture among them


def generation(of: Experiment, mesh: Mesh, *, prompts: int | None = None) -> list[Program]:
    """So many prompts at once, or one a device that has rows of its own."""
    model, compute = of.model, of.hardware.compute
    meshes.check(model, mesh)
    count, room = rows_on(mesh, prompts), bucket(of.sampling.max_new_tokens, 32)
    params = _layers_apart(abstract_params(model, jnp.dtype(compute.dtype), mesh), model.decoder.layers)
    serving = with_params(model, compute, params, apart=True)
    row = rows.conversation(model, PROMPT, None)
    batch = _as_answered(rows.on(mesh, row, count))
    each = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=meshes.everywhere(mesh))
    method, numbers = method_of(of.sampling, model.decoder.vocab)
    stops: Any = Stops(np.zeros(8, np.int32), np.int32(0))
    with meshes.use(mesh):
        first: Any = prefill.lower(serving, batch, each, each, np.uint32(0), stops, numbers, new=room, method=method)
        loop = extend.lower(serving, _placed(first.out_info, mesh), np.int32(room), stops, numbers, method=method)
    read = decoder_operations(model.decoder, count, PROMPT, count) + count * vision_operations(model.vision, rows.sizes(row, model.vision))
    context = PROMPT + room
    token = decoder_operations(model.decoder, count, context, count) - decoder_operations(model.decoder, count, context - 1, 0)
    held = held_by(params)
    return [
        Program(f"generation, {count} prompts of {PROMPT} tokens", first, mesh, read, held=held),
        Program(f"generation, a token for each of {count} prompts", loop, mesh, token, held=held),
    ]


def _layers_apart(params: dict[str, Any], layers: int) -> dict[str, Any]:
    """As they are for decoding."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert leaf.sharding is not None
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=meshes.of_one_layer(leaf.sharding))

    decoder = params["decoder"]
    blocks = {i: jax.tree.map(one, decoder["blocks"]) for i in range(layers)}
    return {**params, "decoder": {**decoder, "blocks": blocks}}


def _as_answered(batch: Batch) -> Batch:
    """Any row sees any picture, and pixels are numbers already."""
    vision = batch.vision
    assert vision is not None
    patches = jax.ShapeDtypeStruct(vision.patches.shape, jnp.float32, sharding=vision.patches.sharding)
    return replace(batch, vision=replace(vision, patches=patches, groups=1, levels=None), sources=None)


def _placed(state: Any, mesh: Mesh) -> Any:
    """What the first program leaves to the second, where it leaves it."""

    def at(sharding: NamedSharding, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    small = at(meshes.everywhere(mesh), state._replace(cache=()))
    return small._replace(cache=at(NamedSharding(mesh, meshes.RULES.spec(CACHE)), state.cache))
