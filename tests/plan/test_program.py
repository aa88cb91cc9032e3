"""Counters, on programs whose operations and bytes are known exactly."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blm_jax.config import MeshConfig
from blm_jax.mesh import make_mesh
from blm_jax.plan import fits, program
from blm_jax.plan.hlo import Module
from blm_jax.plan.topology import describe

ROWS, WIDTH, TURNS, OUTER = 64, 256, 5, 3


@pytest.fixture(scope="module")
def here() -> Mesh:
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.fixture(scope="module")
def pod() -> Mesh:
    return make_mesh(MeshConfig(1, 4, 1), describe("v5e:2x2").devices)


def text_of(function: Callable[..., Any], *shapes: Any, options: dict[str, str] | None = None) -> str:
    compiled = fits.compile_for(jax.jit(function).lower(*shapes), options or {})
    assert not isinstance(compiled, fits.Overflow)
    return str(compiled.as_text())


def shape(mesh: Mesh, dims: tuple[int, ...], spec: P, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))


def without_trip_counts(text: str) -> str:
    """As the TPU compiler writes it."""
    return re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)


# --- products ------------------------------------------------------------------------------------------------------------


def nested(x: jax.Array, kernels: jax.Array) -> jax.Array:
    """[OUTER, TURNS] products, and one of its own in each outer turn."""

    def outer(x: jax.Array, kernels: jax.Array) -> tuple[jax.Array, None]:
        x = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]
        return jnp.tanh(x @ kernels[0]), None

    return jax.lax.scan(outer, x, kernels)[0]


KERNELS = (OUTER, TURNS, WIDTH, WIDTH)
NESTED = OUTER * (TURNS + 1) * 2 * ROWS * WIDTH**2


@pytest.mark.parametrize("strip", [False, True], ids=["known trip counts", "stepped through"])
def test_products_in_nested_loops(here: Mesh, strip: bool) -> None:
    text = text_of(nested, shape(here, (ROWS, WIDTH), P()), shape(here, KERNELS, P()))
    assert ("known_trip_count" in text) and without_trip_counts(text) != text
    counts = program.count(without_trip_counts(text) if strip else text, here)
    assert counts.products == {"f32": NESTED}
    assert not counts.collectives and not counts.unknown


def test_products_in_nested_loops_for_tpu(pod: Mesh) -> None:
    text = text_of(nested, shape(pod, (ROWS, WIDTH), P(), jnp.bfloat16), shape(pod, KERNELS, P(), jnp.bfloat16))
    assert "known_trip_count" not in text
    counts = program.count(text, pod)
    assert counts.operations == NESTED and not counts.unknown


@pytest.mark.parametrize("strip", [False, True])
def test_loops_of_other_steps_and_directions(here: Mesh, strip: bool) -> None:
    def count_down(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] > 3, lambda s: (s[0] - 3, jnp.tanh(s[1] @ s[1])), (20, x))[1]

    def by_two(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] <= 9, lambda s: (2 + s[0], jnp.tanh(s[1] @ s[1])), (1, x))[1]

    for function, turns in ((count_down, 6), (by_two, 5)):
        text = text_of(function, shape(here, (WIDTH, WIDTH), P()))
        assert program.count(without_trip_counts(text) if strip else text, here).operations == turns * 2 * WIDTH**3


def test_a_loop_that_data_ends_counts_as_one_turn_and_is_named(here: Mesh) -> None:
    def until_small(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x @ x, x)

    counts = program.count(text_of(until_small, shape(here, (WIDTH, WIDTH), P())), here)
    assert counts.operations == 2 * WIDTH**3
    assert len(counts.unknown) == 1 and "while" in counts.unknown[0]


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(window_strides=(1, 1), padding="VALID"),
    "padded": dict(window_strides=(1, 1), padding="SAME"),
    "strided": dict(window_strides=(2, 3), padding=((2, 1), (0, 3))),
    "spread": dict(window_strides=(1, 1), padding=((3, 3), (2, 2)), lhs_dilation=(2, 1)),
    "apart": dict(window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 2)),
    "grouped": dict(window_strides=(1, 1), padding="SAME", feature_group_count=4),
    "grouped by batch": dict(window_strides=(1, 1), padding="SAME", batch_group_count=2),
}


@pytest.mark.parametrize("how", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolutions_as_xla_counts_them(here: Mesh, how: dict[str, Any]) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, **how)

    groups = how.get("feature_group_count", 1)
    compiled = jax.jit(convolve).lower(jnp.zeros((2, 8, 17, 13)), jnp.zeros((12, 8 // groups, 5, 3))).compile()
    analysis: Any = compiled.cost_analysis()
    module = Module(str(compiled.as_text()))
    found = [visit for visit in module.visits() if visit.instruction.opcode == "convolution"]
    assert len(found) == 1
    assert program.product_operations(found[0].instruction, found[0].computation) == analysis["flops"]


# --- between devices -----------------------------------------------------------------------------------------------------


def exchange(kind: str, axis: str, size: int) -> Callable[[jax.Array], jax.Array]:
    """Keeps a local shape of [ROWS, WIDTH] by one collective and what is needed to come back to it."""
    match kind:
        case "all-gather":
            return lambda x: jax.lax.all_gather(x, axis, axis=0, tiled=True).reshape(size, ROWS, WIDTH).max(0)
        case "all-reduce":
            return lambda x: jax.lax.psum(x, axis)
        case "reduce-scatter":
            return lambda x: jnp.tile(jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True), (size, 1))
        case "all-to-all":
            return lambda x: jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
        case _:
            return lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def received(kind: str, size: int, itemsize: int) -> float:
    """Bytes of one exchange, from what each of them has to bring: nothing of the compiler's."""
    own = ROWS * WIDTH * itemsize
    return {
        "all-gather": (size - 1) * own,
        "all-reduce": 2 * own * (size - 1) / size,
        "reduce-scatter": own * (size - 1) / size,
        "all-to-all": own * (size - 1) / size,
        "collective-permute": own,
    }[kind]


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def in_loops(mesh: Mesh, axis: str, kind: str, spec: P) -> Callable[..., jax.Array]:
    step = exchange(kind, axis, mesh.shape[axis])

    def local(x: jax.Array) -> jax.Array:
        def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(step(x)), None

        def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(inner, x, None, length=TURNS)[0], None

        return jax.lax.scan(outer, x, None, length=OUTER)[0]

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def totals(counts: program.Counts) -> Counter[tuple[str, tuple[str, ...]]]:
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one in counts.collectives:
        found[one.kind, one.groups.axes] += round(one.bytes * one.times)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_bytes_by_kind_and_axis(here: Mesh, kind: str, axis: str) -> None:
    spec = P(("data", "fsdp", "tensor"))
    text = text_of(in_loops(here, axis, kind, spec), shape(here, (8 * ROWS, WIDTH), spec))
    expected = {(kind, (axis,)): OUTER * TURNS * received(kind, 2, 4)}
    counts = program.count(without_trip_counts(text), here)
    assert totals(counts) == expected
    assert {one.times for one in counts.collectives} == {OUTER * TURNS}
    assert all(one.groups.size == 2 and not one.groups.slices for one in counts.collectives)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_for_tpu(pod: Mesh, kind: str) -> None:
    spec = P("fsdp")
    text = text_of(in_loops(pod, "fsdp", kind, spec), shape(pod, (4 * ROWS, WIDTH), spec))
    counts = program.count(text, pod)
    assert totals(counts) == {(kind, ("fsdp",)): OUTER * TURNS * received(kind, 4, 4)}
    assert not counts.unknown


def test_bytes_between_slices() -> None:
    """The sum over `data` leaves the slice through the hosts; what fsdp sends stays within."""
    mesh = make_mesh(MeshConfig(4, 2, 1), describe("2xv5e:2x2").devices)
    assert [{device.slice_index for device in rows.flat} for rows in mesh.devices] == [{0}, {0}, {1}, {1}]
    both = P(("data", "fsdp"))

    def local(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "data") + jax.lax.psum_scatter(jax.lax.all_gather(x, "fsdp", tiled=True), "fsdp", tiled=True)

    function = jax.shard_map(local, mesh=mesh, in_specs=both, out_specs=both, check_vma=False)
    counts = program.count(text_of(function, shape(mesh, (8 * ROWS, WIDTH), both)), mesh)
    own = ROWS * WIDTH * 4
    between = [one for one in counts.collectives if one.groups.slices]
    # The slice has added up its part, and scattered it, before: half of each device's numbers leaves the slice, and comes back summed.
    assert {one.groups.axes for one in between} == {("data",)}
    assert sum(one.bytes * one.times for one in between) == own / 2
    within = [one for one in counts.collectives if not one.groups.slices]
    assert {("fsdp",), ("data",)} == {one.groups.axes for one in within}
    assert totals(counts)["all-gather", ("fsdp",)] == totals(counts)["reduce-scatter", ("fsdp",)] == own


@pytest.mark.parametrize("options", [{}, {"xla_tpu_decompose_einsum_reduce_scatter": "true"}], ids=["plain", "windowed"])
def test_products_that_turn_around_a_ring(options: dict[str, str]) -> None:
    """A product and the scattering of its result in one loop, whose steps are unrolled: each partial product counts once."""
    mesh = make_mesh(MeshConfig(1, 8, 1), describe("v5e:2x4").devices)
    rows, wide = P("fsdp"), 2048

    def local(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(x.T @ y, "fsdp", scatter_dimension=0, tiled=True)

    function = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)
    given = shape(mesh, (8 * wide, wide), rows, jnp.bfloat16)
    counts = program.count(text_of(function, given, given, options=options), mesh)
    assert counts.operations == 2 * wide**3
    kinds = {one.kind for one in counts.collectives}
    least = 2 * wide**2 * 7 / 8
    assert kinds == ({"collective-permute"} if options else {"reduce-scatter"})
    assert least <= sum(one.bytes * one.times for one in counts.collectives) <= (1.3 if options else 1) * least
    assert any(one.waits for one in counts.collectives) == (not options)


def test_a_group_of_several_axes_is_named_by_all_of_them(here: Mesh) -> None:
    spec = P(("data", "fsdp", "tensor"))
    function = jax.shard_map(lambda x: jax.lax.psum(x, ("data", "tensor")), mesh=here, in_specs=spec, out_specs=P("fsdp"), check_vma=False)
    counts = program.count(text_of(function, shape(here, (8 * ROWS, WIDTH), spec)), here)
    assert totals(counts) == {("all-reduce", ("data", "tensor")): 2 * ROWS * WIDTH * 4 * 3 // 4}
    assert counts.collectives[0].groups.size == 4


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=1,'axis_1'=4] {'axis_0','axis_1'}", [[0, 1, 2, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_2'}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_however_they_are_written(written: str, expected: list[list[int]]) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 1), jax.devices()[:4])
    text = f"""HloModule m

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[6]) -> f32[6] {{
  %x = f32[6]{{0}} parameter(0)
  ROOT %r = f32[6]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}, use_global_device_ids=true, to_apply=%add
}}
"""
    (found,) = program.count(text, mesh).collectives
    size = len(expected[0])
    assert found.bytes == 2 * 24 * (size - 1) / size
    axes = {(0, 1): ("fsdp",), (0, 2): ("data",), (0, 1, 2, 3): ("data", "fsdp")}[tuple(expected[0])]
    assert found.groups.axes == axes


def test_a_sum_that_hands_out_parts_is_no_sum_of_all() -> None:
    """What the TPU compiler writes for some reduce-scatters: a kernel that is named for what it does."""
    mesh = make_mesh(MeshConfig(1, 4, 1), jax.devices()[:4])
    text = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %all = f32[64,8]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16,8]{1,0} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0} parameter(0)
  ROOT %r = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = program.count(text, mesh).collectives
    assert (found.kind, found.bytes, found.waits) == ("reduce-scatter", 64 * 8 * 4 * 3 / 4, True)


# --- a training step of two products a layer -------------------------------------------------------------------------------

LAYERS, TOKENS, FFN = 4, 512, 1024


def learn(mesh: Mesh, *, leading: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Weights of LAYERS layers, divided over fsdp and gathered in the scan's body in bfloat16; all made again on the way back.

    `leading`: what is gathered along another dimension than the first is turned around for it.
    """
    specs = {"up": P(None, "fsdp"), "down": P(None, None, "fsdp")}

    def gathered(weight: jax.Array, axis: int) -> jax.Array:
        weight = weight.astype(jnp.bfloat16)
        if not leading:
            return jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True)
        return jnp.moveaxis(jax.lax.all_gather(jnp.moveaxis(weight, axis, 0), "fsdp", axis=0, tiled=True), 0, axis)

    def local(weights: dict[str, jax.Array], x: jax.Array) -> Any:
        def block(x: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return x + jax.nn.silu(x @ gathered(layer["up"], 0)) @ gathered(layer["down"], 1), None

        def loss(weights: dict[str, jax.Array]) -> jax.Array:
            return jnp.mean(jax.lax.scan(jax.checkpoint(block), x, weights)[0].astype(jnp.float32) ** 2)

        slopes = jax.grad(loss)(weights)
        return jax.tree.map(lambda weight, slope: weight - jax.lax.psum(slope, "data"), weights, slopes)

    function = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(("data", "fsdp"))), out_specs=specs, check_vma=False)
    weights = {"up": shape(mesh, (LAYERS, WIDTH, FFN), specs["up"]), "down": shape(mesh, (LAYERS, FFN, WIDTH), specs["down"])}
    return function, (weights, shape(mesh, (mesh.shape["data"] * mesh.shape["fsdp"] * TOKENS, WIDTH), P(("data", "fsdp")), jnp.bfloat16))


@pytest.mark.parametrize("leading", [True, False])
def test_a_training_step_for_tpu(leading: bool) -> None:
    """Scattered along its last dimension, the compiler sums the slope of `down` whole and takes a part: twice the bytes, a fault."""
    mesh = make_mesh(MeshConfig(2, 2, 1), describe("v5e:2x2").devices)
    function, inputs = learn(mesh, leading=leading)
    counts = program.count(text_of(function, *inputs), mesh)
    kernels = LAYERS * 2 * WIDTH * FFN
    # Forward, twice backward, and `up` once more: nothing looks again at what `down` gave.
    assert counts.operations == 2 * TOKENS * 3.5 * kernels
    sent, half = totals(counts), 2 * kernels // 2
    assert sent["all-gather", ("fsdp",)] == 2 * half
    assert sent["all-reduce", ("data",)] == 2 * half  # float32, a shard
    faults = program.faults(counts, {"blocks": inputs[0]})
    if leading:
        assert sent["reduce-scatter", ("fsdp",)] == half and not sent["all-reduce", ("fsdp",)]
        assert faults == []
    else:
        assert sent["reduce-scatter", ("fsdp",)] == half // 2 and sent["all-reduce", ("fsdp",)] == half
        assert len(faults) == 1 and "like blocks.down" in faults[0] and "over fsdp, 4 times" in faults[0]


# --- kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys", "query_block", "key_block"), [(512, 512, 128, 128), (512, 512, 256, 128), (384, 384, 128, 384)]
)
def test_visited_blocks(queries: int, keys: int, query_block: int, key_block: int) -> None:
    mask = np.tril(np.ones((queries, keys), bool))
    blocks = mask.reshape(queries // query_block, query_block, keys // key_block, key_block).any(axis=(1, 3))
    assert program.visited(queries, keys, query_block, key_block, True) == blocks.sum() * query_block * key_block
    assert program.visited(queries, keys, query_block, key_block, False) == queries * keys


@pytest.mark.parametrize(("causal", "packed"), [(True, False), (True, True), (False, True)])
def test_splash_attention(pod: Mesh, causal: bool, packed: bool) -> None:
    heads, length, dim, block, rows = 4, 1024, 128, 256, 2
    names = [f"block_{end}" for end in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")]
    mask = (splash_mask.CausalMask if causal else splash_mask.FullMask)((length, length))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        sizes = splash.BlockSizes(**cast(Any, dict.fromkeys(names, block)))
        kernel: Any = splash.make_splash_mha(splash_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1)
        one = lambda q, k, v, own: kernel(q, k, v, segment_ids=splash.SegmentIds(own, own) if packed else None)  # noqa: E731
        return jnp.sum(jax.vmap(one)(q, k, v, segments).astype(jnp.float32))

    spec = P("fsdp")
    slopes = jax.grad(local, argnums=(0, 1, 2))
    function = jax.shard_map(slopes, mesh=pod, in_specs=(spec,) * 4, out_specs=(spec,) * 3, check_vma=False)
    given = shape(pod, (4 * rows, heads, length, dim), spec, jnp.bfloat16)
    counts = program.count(text_of(function, given, given, given, shape(pod, (4 * rows, length), spec, jnp.int32)), pod)
    many = length // block
    pairs = block**2 * (many * (many + 1) // 2 if causal else many**2)
    one = 2 * rows * heads * dim * pairs
    assert sorted(kernel.operations or 0 for kernel in counts.kernels) == [2 * one, 3 * one, 4 * one]
    assert math.isclose(counts.operations, 9 * one)


# --- memory --------------------------------------------------------------------------------------------------------------


def test_traffic_of_a_plain_pass(pod: Mesh) -> None:
    given = shape(pod, (1 << 26,), P("fsdp"))
    assert program.count(text_of(lambda x: x * 2, given), pod).traffic == 2 * (4 << 26) // 4


def test_traffic_reads_of_a_stack_one_layer_a_turn(pod: Mesh) -> None:
    layers, width = 8, 4096
    text = text_of(
        lambda x, stack: jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, stack)[0],
        shape(pod, (128, width), P(), jnp.bfloat16),
        shape(pod, (layers, width, width), P(), jnp.bfloat16),
    )
    kernels = 2 * layers * width**2
    assert kernels <= program.count(text, pod).traffic <= 1.1 * kernels
