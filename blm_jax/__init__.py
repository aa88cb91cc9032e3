"""BLM: one model that answers questions about what it sees and drives robot arms, for JAX meshes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from blm_jax.config import ComputeConfig
    from blm_jax.infer.session import Model


def load(path: str, mesh: Mesh | None = None, compute: ComputeConfig | None = None, backbone: str | None = None) -> Model:
    """Open a MODEL directory and put it on a mesh; by default on the first device, in float32.

    `backbone` is where the frozen weights of a training checkpoint lie, if they were moved.
    """
    from blm_jax.accelerators import settle_platform

    settle_platform()
    from blm_jax.infer.session import load as open_model  # late: importing the package must not import jax

    return open_model(path, mesh, compute, backbone=backbone)
