"""Runs take as many of the eight virtual devices as their mesh names, and one where it names none: the quickest to compile."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig


def count(config: MeshConfig) -> int:
    sizes = (config.data, config.fsdp, config.tensor)
    return 1 if -1 in sizes else int(np.prod(sizes))


@pytest.fixture(autouse=True, scope="session")
def few_devices() -> Iterator[None]:
    whole = meshes.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda config, devices=None: whole(config, devices or jax.devices()[: count(config)]))
        yield
