from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from blm_jax.config import MeshConfig
from blm_jax.errors import RequestError
from blm_jax.mesh import make_mesh
from blm_jax.plan import topology
from blm_jax.plan.topology import describe, parse


@pytest.mark.parametrize(
    ("name", "slices", "kind", "chips"),
    [
        ("v5e:16x16", 1, "TPU v5 lite", 256),
        ("v5p:4x4x4", 1, "TPU v5", 64),
        ("v6e:8x8", 1, "TPU v6 lite", 64),
        ("2xv5p:2x2x1", 2, "TPU v5", 8),
    ],
)
def test_devices(name: str, slices: int, kind: str, chips: int) -> None:
    found = describe(name)
    assert (found.slices, len(found.devices), found.devices[0].device_kind) == (slices, chips, kind)


def test_a_single_chip() -> None:
    assert len(describe("v5e:1x1").devices) == len(describe("v5p:1x1x1").devices) == 1


def test_the_data_axis_goes_across_slices() -> None:
    devices = describe("2xv5e:2x2").devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(RequestError, match=r"mesh\.data=1 does not divide over 2 slices: make it a multiple of 2"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("v5e", "topology 'v5e' is not understood: write v5e:16x16"),
        ("v5e:0x2", "is not understood"),
        ("0xv5e:2x2", "there are v5e, v5p, v6e"),
        ("v9:2x2", "no chip 'v9' is known; there are v5e, v5p, v6e"),
        ("v5e:2x2x2", "v5e chips stand in a grid of 2 sides: write such as v5e:4x4"),
        ("v5e:32x32", "has 1024 chips: a slice of v5e has at most 256"),
        ("v5p:3x3x3", "not divisible"),
    ],
)
def test_names_that_are_wrong(name: str, wrong: str) -> None:
    with pytest.raises(RequestError, match=wrong) as caught:
        describe(name)
    assert "\n" not in str(caught.value)


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(topology, "find_spec", lambda name: None if name == "libtpu" else real(name))
    with pytest.raises(RequestError, match=r"pip install 'blm-jax\[tpu\]'"):
        describe("v5e:2x2")


def test_links_by_side() -> None:
    """A ring has two links a side, an open row one at its ends."""

    def links(name: str, *sides: int) -> float:
        slices, kind, shape = parse(name)
        given: Any = ()
        return topology.Topology(name, topology.PODS[kind], slices, shape, given).links(sides)

    assert links("v5e:16x16", 0, 1) == 200 and links("v5e:16x16", 1) == 100
    assert links("v5e:8x16", 0) == 50 and links("v5e:8x16", 0, 1) == 150
    assert links("v5p:4x4x8", 0, 1, 2) == 600 and links("v5p:2x2x4", 0, 2) == 300
