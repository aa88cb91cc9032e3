"""What passes between devices of a training step: weights gathered, slopes scattered back, one side of a pod at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig
from blm_jax.plan import program
from blm_jax.plan.topology import describe

AXES = {"first": ("embed", "ffn"), "last": ("ffn", "embed"), "middle": ("head_dim", "embed", "heads"), "alone": ("embed",)}
SHAPES = {"first": (32, 6), "last": (6, 32), "middle": (3, 16, 4), "alone": (48,)}


def test_a_row_of_chips_and_the_sides_it_lies_along() -> None:
    def line(*places: tuple[int, ...]) -> list[Any]:
        return [SimpleNamespace(platform="tpu", coords=place) for place in places]

    assert meshes.stages(line((1, 0, 0), (1, 1, 0), (1, 2, 0))) == (3,)
    assert meshes.stages(line((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0))) == (3, 2)
    assert meshes.stages(line((0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (1, 1, 0), (2, 1, 0))) == (2, 3)
    assert meshes.stages(line(*[(x, y, z) for y in range(2) for z in range(2) for x in range(4)])) == (2, 2, 4)
    assert meshes.stages(line((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0))) == (4,)  # wound up to a ring: no side comes first
    assert meshes.stages(line((0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0))) == (4,)  # two cores a chip
    assert meshes.stages(jax.devices()[:4]) == (4,)


@pytest.mark.parametrize(
    ("name", "mesh", "sides"),
    [
        ("v5e:4x4", (1, 16, 1), (4, 4)),
        ("v5e:4x4", (4, 4, 1), (4,)),
        ("v5e:2x4", (1, 8, 1), (2, 4)),
        ("v5e:16x16", (16, 16, 1), (16,)),
        ("v5p:8x8x8", (8, 64, 1), (8, 8)),
        ("2xv5p:4x4x4", (32, 4, 1), (4,)),
    ],
)
def test_shards_of_a_pod_lie_along_its_sides(name: str, mesh: tuple[int, int, int], sides: tuple[int, ...]) -> None:
    made = meshes.make_mesh(MeshConfig(*mesh), describe(name).devices)
    assert {tuple(sorted(meshes.stages(list(line)))) for line in np.moveaxis(made.devices, 1, -1).reshape(-1, mesh[1])} == {sides}


def slopes(mesh: Mesh, values: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, jax.Array]:
    """Of a loss that takes each row's own numbers times the whole weights."""
    shapes = {name: SHAPES[name] for name in values}
    places = {name: meshes.param_sharding(mesh, AXES[name], shape) for name, shape in shapes.items()}
    weights = {name: jax.device_put(value, places[name]) for name, value in values.items()}
    specs = {name: meshes.by_weight(weight) for name, weight in weights.items()}

    def local(shards: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
        def loss(shards: dict[str, jax.Array]) -> jax.Array:
            total = jnp.float32(0)
            for name, shard in shards.items():
                lies = meshes.divided(AXES[name], shapes[name])
                weight = shard if lies is None else meshes.whole(shard, lies)
                assert weight.shape == shapes[name]
                total += jnp.sum(weight**2 * jnp.sum(rows) * jnp.arange(weight.size, dtype=jnp.float32).reshape(weight.shape))
            return total

        return meshes.total_slopes(jax.grad(loss)(shards), specs)

    with meshes.use(mesh):
        apart = meshes.rows_apart(local, mesh, (specs, meshes.by_rows()), specs)
        given = jax.device_put(rows, NamedSharding(mesh, meshes.by_rows()))
        return jax.jit(apart, out_shardings=places)(weights, given)


@pytest.mark.parametrize(
    ("mesh", "sides"),
    [
        ((1, 8, 1), (8,)),
        ((1, 8, 1), (2, 4)),
        ((1, 8, 1), (4, 2)),
        ((1, 8, 1), (2, 2, 2)),
        ((2, 4, 1), (2, 2)),
        ((1, 4, 2), (2, 2)),
    ],
)
def test_slopes_are_the_same_in_one_stage_or_several(
    monkeypatch: pytest.MonkeyPatch, mesh: tuple[int, int, int], sides: tuple[int, ...]
) -> None:
    """Whole numbers, which add up alike in any order: bit for bit."""
    made = meshes.make_mesh(MeshConfig(*mesh))
    numbers = np.random.default_rng(0)
    values = {name: numbers.integers(-3, 4, shape).astype(np.float32) for name, shape in SHAPES.items()}
    rows = numbers.integers(-3, 4, 8).astype(np.float32)
    monkeypatch.setattr(meshes, "stages", lambda line: sides)
    found = slopes(made, values, rows)
    for name, value in values.items():
        expected = 2 * value * rows.sum() * np.arange(value.size, dtype=np.float32).reshape(value.shape)
        np.testing.assert_array_equal(found[name], expected)


def test_the_tpu_compiler_scatters_slopes_over_two_sides() -> None:
    """One stage over both is summed whole, which is twice as much to send."""
    pod = meshes.make_mesh(MeshConfig(1, 16, 1), describe("v5e:4x4").devices)
    width, axes = 2048, ("embed", "ffn")
    weight = jax.ShapeDtypeStruct((width, width), jnp.bfloat16, sharding=meshes.param_sharding(pod, axes, (width, width)))
    spec = meshes.by_weight(weight)

    def local(shard: jax.Array, x: jax.Array) -> jax.Array:
        lies = meshes.divided(axes, (width, width))
        assert lies is not None
        return jax.grad(lambda shard: jnp.sum(jnp.tanh(x @ meshes.whole(shard, lies)).astype(jnp.float32)))(shard)

    with meshes.use(pod):
        apart = meshes.rows_apart(local, pod, (spec, meshes.by_rows()), spec)
        x = jax.ShapeDtypeStruct((16 * width, width), jnp.bfloat16, sharding=NamedSharding(pod, meshes.by_rows()))
        text = jax.jit(apart).lower(weight, x).compile().as_text()
    counts = program.count(str(text), pod)
    sent = {kind: sum(one.bytes * one.times for one in counts.collectives if one.kind == kind) for kind in ("reduce-scatter", "all-reduce")}
    least = 2 * width**2 * 15 / 16
    assert sent["all-reduce"] == 0 and least <= sent["reduce-scatter"] <= 1.05 * least  # parts are padded
