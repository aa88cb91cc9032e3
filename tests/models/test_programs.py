"""What is in the compiled programs, and what is not: blocks above k, activations kept for the backward pass, kernels for TPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from blm_jax import mesh as meshes
from blm_jax.batch import Batch
from blm_jax.config import BackboneConfig, ComputeConfig, MeshConfig, Remat
from blm_jax.data.collate import collate
from blm_jax.mesh import make_mesh
from blm_jax.models.mllm import Mllm, abstract_params, with_params
from tests.models.chats import IMAGE, TEXT, VIDEO, make_example
from tests.models.oracle import CASES, params_of, torch_model

CONFIG = CASES["plain"]


def make_batch(config: BackboneConfig, rows: int = 3, length: int | None = None) -> Batch:
    grids = (TEXT, IMAGE, VIDEO)
    examples = [make_example(config, grids[i % 3], seed=i) for i in range(rows)]
    return collate([[example] for example in examples], config, length=length, row_multiple=rows)


def params() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, params_of(torch_model(CONFIG), CONFIG))


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program, those inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_nothing_above_block_k_runs(blocks: int) -> None:
    """Not the blocks, not the norm, not the head: their weights are poisoned, and the loop is as long as it should be."""
    tree, batch = params(), meshes.put(make_batch(CONFIG), None)
    expected = with_params(CONFIG, ComputeConfig(), tree).hidden(batch, blocks)
    decoder = tree["decoder"]
    decoder["blocks"] = jax.tree.map(lambda leaf: leaf.at[blocks:].set(jnp.nan), decoder["blocks"])
    decoder["norm"], decoder["head"] = jax.tree.map(lambda leaf: leaf * jnp.nan, (decoder["norm"], decoder["head"]))
    model = with_params(CONFIG, ComputeConfig(), tree)
    np.testing.assert_array_equal(model.hidden(batch, blocks), expected)

    program = jax.make_jaxpr(lambda model, batch: model.hidden(batch, blocks))(model, batch)
    loops = [equation.params["length"] for equation in equations(program.jaxpr) if equation.primitive.name == "scan"]
    assert loops[-1] == blocks  # the tower's come first
    vocab = [
        eq for eq in equations(program.jaxpr) if eq.primitive.name == "dot_general" and CONFIG.decoder.vocab in eq.outvars[0].aval.shape
    ]
    assert not vocab


def value_and_grad(remat: Remat) -> Any:
    def value(tree: dict[str, Any], batch: Batch) -> jax.Array:
        logits = with_params(CONFIG, ComputeConfig(remat=remat), tree)(batch)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) * batch.weights)

    return jax.jit(jax.value_and_grad(value))


def test_remat_changes_memory_and_nothing_else() -> None:
    tree, batch = params(), meshes.put(make_batch(CONFIG), None)
    compiled = {remat: value_and_grad(remat).lower(tree, batch).compile() for remat in ("none", "dots", "dots_no_batch", "full")}
    memory = {remat: program.memory_analysis().temp_size_in_bytes for remat, program in compiled.items()}
    assert memory["full"] < memory["dots"] < memory["none"]
    assert memory["full"] < memory["dots_no_batch"] < memory["none"]
    expected = compiled["none"](tree, batch)
    for remat in ("dots", "dots_no_batch", "full"):
        for one, other in zip(jax.tree.leaves(compiled[remat](tree, batch)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-4)


def test_bfloat16() -> None:
    """Every product of the towers is in bfloat16; logits and what norms and softmax sum are float32; answers are near."""
    tree, batch = params(), meshes.put(make_batch(CONFIG), None)
    expected = with_params(CONFIG, ComputeConfig(), tree)(batch)
    model = with_params(CONFIG, ComputeConfig(dtype="bfloat16"), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree))
    logits = jax.jit(Mllm.__call__)(model, batch)
    assert logits.dtype == jnp.float32
    real = np.asarray(batch.segments) > 0
    difference = np.linalg.norm((logits - expected)[real]) / np.linalg.norm(np.asarray(expected)[real])
    assert difference < 0.03
    program = jax.make_jaxpr(Mllm.__call__)(model, batch)
    products = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "dot_general"]
    assert products and all(x.aval.dtype == jnp.bfloat16 for equation in products for x in equation.invars)


@pytest.fixture
def pod() -> Iterator[jax.sharding.Mesh]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent devices cannot be read back
    yield make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), devices)
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_training_step_compiles_for_tpu(pod: jax.sharding.Mesh, remat: Remat) -> None:
    """With pictures, heads of 80 as in the real tower, and rows long enough for the kernel in both towers."""
    vision = replace(CONFIG.vision, width=160, ffn=96)
    config = replace(CONFIG, vision=vision, decoder=replace(CONFIG.decoder, vocab=512))
    batch = make_batch(config, rows=2, length=256)
    rows = jax.sharding.NamedSharding(pod, meshes.RULES.spec(("batch",)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    compute = ComputeConfig(dtype="bfloat16", remat=remat)

    def value(tree: dict[str, Any], batch: Batch) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(with_params(config, compute, tree)(batch), axis=-1) * batch.weights)

    with meshes.use(pod):
        program = jax.jit(jax.grad(value)).lower(abstract_params(config, jnp.float32, pod), shapes).compile()
    assert str(program.as_text()).count("tpu_custom_call") >= 6  # forward and twice backward, in each tower
