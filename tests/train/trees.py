"""Small trees of every kind of array that a run keeps, on meshes or on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig

SPECS = {"kernel": ("layers", "embed", None), "norm": ("norm",), "step": (), "m": ("layers", "embed", None), "v": (None, "embed")}
# Arrays of more than a kilobyte lie in files of their own, smaller ones within orbax's index.
SHAPES: dict[str, tuple[tuple[int, ...], Any]] = {
    "kernel": ((3, 64, 20), jnp.float32),
    "norm": ((7,), jnp.float32),
    "step": ((), jnp.int32),
    "m": ((3, 64, 20), jnp.bfloat16),
    "v": ((1, 16), jnp.int8),
}
Trees = tuple[dict[str, Any], dict[str, Any]]
PROVENANCE = {"format": 1, "stage": 1}
ASSETS = {"config.json": b'{"made": "up"}', "additional_chat_templates/x.jinja": "{{ é }}".encode()}


def abstract(*sizes: int) -> Trees:
    """Parameters and state; on a mesh of these sizes, or on a single device."""
    mesh = meshes.make_mesh(MeshConfig(*sizes)) if sizes else None

    def leaf(name: str) -> jax.ShapeDtypeStruct:
        shape, dtype = SHAPES[name]
        sharding = None if mesh is None else meshes.param_sharding(mesh, SPECS[name], shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = {"decoder": {"blocks": {"kernel": leaf("kernel")}, "norm": leaf("norm")}}
    return params, {"optimizer": {"m": leaf("m"), "v": leaf("v"), "none": {}}, "step": leaf("step")}


def values(seed: int, asked: Trees) -> Trees:
    """Any bits at all, NaNs among them, the same for a seed however they are divided."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        rng = np.random.default_rng([seed, *jax.tree_util.keystr(path).encode()])
        whole = np.frombuffer(rng.bytes(max(1, int(np.prod(leaf.shape))) * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape)
        if leaf.sharding is None:
            return jnp.asarray(whole)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

    return jax.tree_util.tree_map_with_path(draw, asked)


def bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[jax.tree_util.keystr(path)] = (leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes())
    return found
