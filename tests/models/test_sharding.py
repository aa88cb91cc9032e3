"""The same outputs on any mesh, and work that is divided, not repeated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax import mesh as meshes
from blm_jax.batch import Batch, VisionRows
from blm_jax.config import BackboneConfig, ComputeConfig, MeshConfig
from blm_jax.data.collate import collate
from blm_jax.errors import RequestError
from blm_jax.mesh import Rules, make_mesh
from blm_jax.models.mllm import Mllm, abstract_params, random_params, with_params
from tests.hlo import dot_flops
from tests.models.chats import IMAGE, IMAGES, TEXT, VIDEO, make_example
from tests.models.oracle import CASES, params_of, torch_model

CONFIG = CASES["plain"]
MESHES = {"8x1": (8, 1, 1), "fsdp 8": (1, 8, 1), "4x2": (1, 4, 2), "2x2x2": (2, 2, 2)}


def make_batch(config: BackboneConfig, *, grouped: bool) -> Batch:
    examples = [make_example(config, grids, seed) for seed, grids in enumerate([TEXT, IMAGE, IMAGES, VIDEO, TEXT, IMAGES, IMAGE, IMAGE])]
    layout: dict[str, Any] = {"vision_row_length": 8 * config.vision.window_patches} if grouped else {"row_multiple": 8}
    return collate([[example] for example in examples], config, length=160, **layout)


def outputs(model: Mllm, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return model(batch), model.hidden(batch, blocks=1)


def model_on(mesh: jax.sharding.Mesh | None) -> Mllm:
    params = params_of(torch_model(CONFIG), CONFIG)
    shardings = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_params(CONFIG, jnp.float32, mesh))
    return with_params(CONFIG, ComputeConfig(), jax.device_put(params, shardings))


@pytest.fixture(scope="module")
def expected() -> tuple[jax.Array, jax.Array]:
    return jax.jit(outputs)(model_on(None), meshes.put(make_batch(CONFIG, grouped=False), None))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", MESHES.values(), ids=list(MESHES))
def test_sharded_equals_unsharded(expected: tuple[jax.Array, jax.Array], shape: tuple[int, int, int], grouped: bool) -> None:
    mesh = make_mesh(MeshConfig(*shape))
    with meshes.use(mesh):
        ours = jax.jit(outputs)(model_on(mesh), meshes.put(make_batch(CONFIG, grouped=grouped), mesh))
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)


def test_parameters_are_divided() -> None:
    params = random_params(CONFIG, jnp.float32, make_mesh(MeshConfig(2, 2, 2)), seed=0)
    kernel = params["decoder"]["blocks"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 32, 2, 16)  # width over fsdp, heads over tensor
    odd = random_params(CASES["irregular vision layers, small windows"], jnp.float32, make_mesh(MeshConfig(1, 8, 1)), seed=0)
    assert odd["vision"]["blocks"]["gate"]["kernel"].addressable_shards[0].data.shape == (5, 6, 51)


def vision_flops(model: Mllm, rows: VisionRows) -> int:
    """Of one device, in matrix products, from its compiled program."""
    flops = dot_flops(jax.jit(lambda model, rows: model.vision(rows)).lower(model, rows).compile())
    assert flops > 0
    return flops


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_no_patch_is_computed_twice(shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*shape))
    rows = make_batch(CONFIG, grouped=True).vision
    assert rows is not None
    whole = vision_flops(model_on(None), meshes.put(rows, None))
    with meshes.use(mesh):
        part = vision_flops(model_on(mesh), meshes.put(rows, mesh))
    # Embedding a patch has no heads to divide over the tensor axis: that axis repeats it, a 400th of the work at full size.
    embedding = 2 * rows.patches.size * CONFIG.vision.width
    tensor = shape[2]
    assert part == pytest.approx((whole - embedding) / 8 + embedding / (8 / tensor), rel=1e-3)


def test_a_tensor_axis_that_cuts_heads_is_refused() -> None:
    sizes = replace(CONFIG.decoder, width=3584, heads=28, kv_heads=4, ffn=18944, mrope_section=(16, 24, 24))
    config = replace(CONFIG, decoder=sizes, vision=replace(CONFIG.vision, width=1280, heads=16, ffn=3420, out_width=3584))
    wrong = "mesh.tensor=8 does not divide decoder heads 28, decoder key heads 4, vision ffn 3420: take 1 or 2 or 4"
    with pytest.raises(RequestError, match=wrong):
        meshes.check(config, make_mesh(MeshConfig(1, 1, 8)))
    meshes.check(config, make_mesh(MeshConfig(1, 2, 4)))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, -1, 1), (2, 2, 4)])
def test_a_mesh_that_does_not_fit_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(RequestError, match="mesh"):
        make_mesh(MeshConfig(*sizes))


def test_rules_refuse_collisions_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="different axes"):
        Rules({"batch": ("data", "data")})
    with pytest.raises(ValueError, match="both want mesh axis 'tensor'"):
        meshes.RULES.spec(("heads", "ffn"))
    with pytest.raises(ValueError, match="no rule"):
        meshes.RULES.spec(("batch", "colour"))


def test_every_parameter_has_a_rule_on_every_shipped_mesh() -> None:
    for config in CASES.values():
        for leaf in jax.tree.leaves(abstract_params(config, jnp.bfloat16, make_mesh(MeshConfig(2, 4, 1)))):
            assert leaf.sharding.shard_shape(leaf.shape)
