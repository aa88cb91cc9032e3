from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from blm_jax import mesh as meshes


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests see eight: a run takes as many as its mesh has, and one where it names none."""
    whole = meshes.make_mesh

    def make(config: Any) -> Any:
        sizes = (config.data, config.fsdp, config.tensor)
        return whole(config, jax.devices()[: 1 if -1 in sizes else int(np.prod(sizes))])

    monkeypatch.setattr(meshes, "make_mesh", make)
