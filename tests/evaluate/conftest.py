from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests see eight: a run takes as many as its mesh has, and one where it names none."""
    whole = meshes.make_mesh

    def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
        sizes = (config.data, config.fsdp, config.tensor)
        return whole(config, (devices or jax.devices())[: 1 if -1 in sizes else int(np.prod(sizes))])

    monkeypatch.setattr(meshes, "make_mesh", make)
