"""`blm train`: from a run's config to its last step."""

from __future__ import annotations

import sys
from typing import Any

import jax

from blm_jax import mesh as meshes
from blm_jax.recipe import Run
from blm_jax.train.goodput import Clock
from blm_jax.train.loop import train
from blm_jax.train.resume import check_config, keep_config
from blm_jax.train.setup import by_one, check_run, open_run


def train_run(run: Run) -> dict[str, Any]:
    """What `blm train --json` prints."""
    check_run(run)
    clock = Clock()
    if jax.process_index() == 0:
        clock.read(run.out)
    with clock.time("start"):
        mesh = meshes.make_mesh(run.hardware.mesh)
        by_one(lambda: check_config(run))
        opened = open_run(run, mesh)
        by_one(lambda: keep_config(run))
        if jax.process_index() == 0:
            print(opened.outline.describe(), file=sys.stderr)
    result = train(opened, clock)
    if jax.process_index() == 0:
        print(clock.line(), file=sys.stderr)
    return {"out": run.out, **result}
