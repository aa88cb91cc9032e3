"""One meaning behind one door: each kernel where it can run, and compiled for TPU where it can't."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import topologies

from blm_jax import mesh as meshes
from blm_jax.config import AttentionName, MeshConfig
from blm_jax.errors import RequestError
from blm_jax.mesh import make_mesh
from blm_jax.models.attention import attend, attend_memory, choose

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def make_inputs(length: int, heads: int, kv_heads: int, dim: int, rows: int = 2, *, packed: bool = True) -> Inputs:
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, length, count, dim)), jnp.float32) for count in (heads, kv_heads, kv_heads))
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1) if packed else np.ones((rows, length), int)
    segments[:, length - length // 5 :] = 0
    return q, k, v, jnp.asarray(segments, jnp.int32)


def reference(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, causal: bool) -> np.ndarray:
    tensors = [torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v)]
    seen = torch.tensor(np.asarray(segments[:, :, None] == segments[:, None, :]))[:, None]
    if causal:
        seen = seen & torch.ones(seen.shape[-2:], dtype=torch.bool).tril()
    return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=seen, enable_gqa=True).transpose(1, 2).numpy()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "heads", "kv_heads", "dim"), [(7, 4, 2, 16), (300, 6, 3, 80), (1100, 2, 1, 64)])
@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_equals_torch(implementation: AttentionName, length: int, heads: int, kv_heads: int, dim: int, causal: bool) -> None:
    """Splash runs here in Pallas's interpreter; lengths and heads that fill no tile included."""
    inputs = make_inputs(length, heads, kv_heads, dim)
    ours = jax.jit(lambda *x: attend(*x, causal=causal, implementation=implementation))(*inputs)
    np.testing.assert_allclose(ours, reference(*inputs, causal), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_long_rows_go_block_by_block(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Without all scores at once: the same values and gradients, in less memory."""
    q, k, v, segments = make_inputs(1500, 4, 2, 16)

    def value(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(q, k, v, segments, causal=causal)))

    def compiled() -> jax.stages.Compiled:
        return jax.jit(jax.value_and_grad(lambda *x: value(*x), (0, 1, 2))).lower(q, k, v).compile()

    whole = compiled()
    monkeypatch.setattr("blm_jax.models.attention.UNROLLED", 1000)
    blocks = compiled()
    for one, other in zip(jax.tree.leaves(blocks(q, k, v)), jax.tree.leaves(whole(q, k, v)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-5)
    memory: list[Any] = [program.memory_analysis() for program in (blocks, whole)]
    assert memory[0].temp_size_in_bytes < memory[1].temp_size_in_bytes / 2


def test_splash_has_the_same_gradients() -> None:
    q, k, v, segments = make_inputs(200, 4, 2, 80)

    def value(implementation: AttentionName, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(q, k, v, segments, causal=True, implementation=implementation)))

    for ours, expected in zip(*(jax.grad(value, (1, 2, 3))(name, q, k, v) for name in ("splash", "xla")), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


def test_splash_on_a_mesh() -> None:
    inputs = make_inputs(256, 4, 2, 64, rows=4)
    with meshes.use(make_mesh(MeshConfig(2, 2, 2))):
        ours = jax.jit(lambda *x: attend(*x, causal=True, implementation="splash"))(*inputs)
    np.testing.assert_allclose(ours, reference(*inputs, True), atol=1e-5, rtol=0)


def test_a_cached_step_equals_the_last_of_a_sequence() -> None:
    q, k, v, segments = make_inputs(90, 6, 2, 32)
    segments = jnp.ones_like(segments)
    expected = attend(q, k, v, segments, causal=True)[:, -1:]
    ours = attend_memory(q[:, -1:], k.swapaxes(1, 2), v.swapaxes(1, 2), segments > 0)
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)


@pytest.fixture
def pod() -> Iterator[jax.sharding.Mesh]:
    """A TPU that is not there: its compiler runs without it."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent devices cannot be read back
    yield make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), devices)
    jax.config.update("jax_enable_compilation_cache", True)


def on(mesh: jax.sharding.Mesh, inputs: Inputs) -> list[jax.ShapeDtypeStruct]:
    axes = [("batch", "length", "heads", "head_dim"), *[("batch", "length", "kv_heads", "head_dim")] * 2, ("batch", "length")]
    dtypes = [jnp.bfloat16] * 3 + [jnp.int32]
    return [
        jax.ShapeDtypeStruct(x.shape, dtype, sharding=jax.sharding.NamedSharding(mesh, meshes.RULES.spec(names)))
        for x, dtype, names in zip(inputs, dtypes, axes, strict=True)
    ]


@pytest.mark.parametrize(("length", "dim", "causal"), [(1024, 128, True), (320, 80, False)])
def test_the_tpu_kernel_compiles_for_tpu(pod: jax.sharding.Mesh, length: int, dim: int, causal: bool) -> None:
    """Forward and backward, chosen by platform: the decoder's heads, and the vision tower's at a length that fills no tile."""

    def value(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, segments, causal=causal).astype(jnp.float32) ** 2)

    shapes = on(pod, make_inputs(length, 4, 2, dim))
    with meshes.use(pod):
        program = jax.jit(jax.grad(value, (0, 1, 2))).lower(*shapes).compile()
    assert str(program.as_text()).count("tpu_custom_call") >= 3  # forward, and backward to queries and to keys


def test_xla_compiles_for_tpu(pod: jax.sharding.Mesh) -> None:
    shapes = on(pod, make_inputs(64, 4, 2, 80))
    with meshes.use(pod):
        program = jax.jit(lambda *x: attend(*x, causal=False)).lower(*shapes).compile()
    assert "tpu_custom_call" not in str(program.as_text())  # a window: one tile


def test_cudnn_is_lowered_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: what can be shown is that the program for one calls cuDNN, in both ways of telling it the mask."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)  # jax would look for the library
    q, k, v, segments = make_inputs(256, 4, 2, 64, packed=False)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    for packed in (True, False):
        traced = jax.jit(lambda *x, packed=packed: attend(*x, causal=True, packed=packed, implementation="cudnn")).trace(q, k, v, segments)
        assert "cudnn" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("wanted", "platform", "length", "dim", "dtype", "expected"),
    [
        ("auto", "cpu", 512, 128, jnp.float32, "xla"),
        ("auto", "tpu", 512, 128, jnp.bfloat16, "splash"),
        ("auto", "tpu", 64, 80, jnp.bfloat16, "xla"),
        ("auto", "gpu", 512, 128, jnp.bfloat16, "cudnn"),
        ("auto", "gpu", 512, 128, jnp.float32, "xla"),
        ("auto", "gpu", 512, 256, jnp.bfloat16, "xla"),
        ("xla", "tpu", 512, 128, jnp.bfloat16, "xla"),
        ("splash", "tpu", 512, 128, jnp.bfloat16, "splash"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, wanted: AttentionName, platform: str, length: int, dim: int, dtype: jnp.dtype, expected: str
) -> None:
    monkeypatch.setattr("blm_jax.models.attention.platform", lambda: platform)
    assert choose(wanted, length, dim, jnp.dtype(dtype)) == expected


def test_cudnn_says_what_it_cannot_do() -> None:
    with pytest.raises(RequestError, match=r"compute\.attention=cudnn needs bfloat16"):
        choose("cudnn", 512, 128, jnp.dtype(jnp.float32))
