"""`blm train`: from a run's config to its last step."""

from __future__ import annotations

import sys
from typing import Any

import jax

from blm_jax import mesh as meshes
from blm_jax.recipe import Run
from blm_jax.train.goodput import Clock
from blm_jax.train.loop import train
from blm_jax.train.resume import keep_config
from blm_jax.train.setup import open_run


def train_run(run: Run) -> dict[str, Any]:
    """What `blm train --json` prints."""
    clock = Clock()
    if jax.process_index() == 0 and run.out:
        clock.read(run.out)
    with clock.time("start"):
        mesh = meshes.make_mesh(run.hardware.mesh)
        opened = open_run(run, mesh)
        if jax.process_index() == 0:
            keep_config(run)
            print(opened.outline.describe(), file=sys.stderr)
    result = train(opened, clock)
    if jax.process_index() == 0:
        print(clock.line(), file=sys.stderr)
    return {"out": run.out, **result}
