"""Pods that are not here: their devices, as the TPU compiler sees them, and what their chips can do."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

from blm_jax.counts import CHIPS, Chip
from blm_jax.errors import RequestError


class Pod(NamedTuple):
    """How chips of a kind are put together."""

    chip: Chip
    memory: int  # GB of a chip, as it is sold; the compiler knows what of it is free
    links: float  # GB/s that a chip receives from its neighbours, over all its links
    network: float  # GB/s that a chip receives from other slices: its share of the host's cards
    sides: int  # of the grid of chips
    most: int  # chips of a slice
    ring: int  # a side of a multiple of so many chips is closed to a ring


# Google's pages "TPU v5e", "TPU v5p" and "TPU v6e (Trillium)": links are half of what is given as bidirectional bandwidth a chip
# (400, 1200 and 800 GB/s), network is the pod's or chip's data centre bandwidth (6.4 Tb/s of 256 chips, 50 Gb/s, 25.6 Tb/s of 256).
PODS = {
    "v5e": Pod(CHIPS["TPU v5e"], memory=16, links=200, network=3.125, sides=2, most=256, ring=16),
    "v5p": Pod(CHIPS["TPU v5p"], memory=95, links=600, network=6.25, sides=3, most=6144, ring=4),
    "v6e": Pod(CHIPS["TPU v6e"], memory=32, links=400, network=12.5, sides=2, most=256, ring=16),
}
_EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8, or 2xv5p:4x4x4 for two slices"


class Topology(NamedTuple):
    name: str
    pod: Pod
    slices: int
    sides: tuple[int, ...]  # chips along each side of a slice
    devices: tuple[Any, ...]

    def links(self, sides: tuple[int, ...]) -> float:
        """GB/s that a chip receives at best from a group that lies along these sides: two links a side, one where it is no ring."""
        total = sum((2 if self.sides[side] % self.pod.ring == 0 else 1) for side in sides)
        return self.pod.links * total / (2 * self.pod.sides)


def parse(name: str) -> tuple[int, str, tuple[int, ...]]:
    """2xv5p:4x4x4 -> 2 slices, v5p, (4, 4, 4)."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name.strip())
    if found is None:
        raise RequestError(f"topology {name!r} is not understood: write {_EXAMPLES}")
    slices, kind, sides = int(found[1] or 1), found[2], tuple(int(side) for side in found[3].split("x"))
    if kind not in PODS:
        raise RequestError(f"topology {name!r}: no chip {kind!r} is known; there are {', '.join(PODS)}, as in {_EXAMPLES}")
    pod = PODS[kind]
    if len(sides) != pod.sides:
        example = "x".join("4" * pod.sides)
        raise RequestError(f"topology {name!r}: {kind} chips stand in a grid of {pod.sides} sides: write such as {kind}:{example}")
    chips = 1
    for side in sides:
        chips *= side
    if chips > pod.most:
        raise RequestError(
            f"topology {name!r} has {chips} chips: a slice of {kind} has at most {pod.most}; write 2x{kind}:... for two slices"
        )
    return slices, kind, sides


def describe(name: str) -> Topology:
    """Asks the compiler, which must be installed; no TPU is needed or looked for."""
    slices, kind, sides = parse(name)
    if find_spec("libtpu") is None:
        raise RequestError("the TPU compiler is not installed: pip install 'blm-jax[tpu]'")
    # What libtpu would else ask a server for, or complain about at length.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)

    import jax
    from jax.experimental import topologies

    grid = f"{kind}:{'x'.join(map(str, sides))}"
    given: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if all(side == 1 for side in sides):
        given["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=grid, **given).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise RequestError(f"topology {name!r}: {str(error).splitlines()[0]}; write such as {_EXAMPLES}") from error
    return Topology(name.strip(), PODS[kind], slices, sides, tuple(devices))
