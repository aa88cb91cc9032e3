"""What the cameras see of steps that were done, drawn after the episodes are over."""

from __future__ import annotations

import jax
import numpy as np

from blm_jax.evaluate.world import view
from blm_jax.evaluate.world.scene import Setting, State

FRAMES = 64  # scenes that are drawn at a time


def drawn(settings: Setting, states: State) -> np.ndarray:
    """[frames, cameras, height, width, 3] uint8; a frame has a setting and a state, at the same place of both."""
    count = len(states.joints)
    places = np.minimum(np.arange(-(-count // FRAMES) * FRAMES), count - 1)  # programs have one shape
    made = [
        np.asarray(_pictures(*jax.tree.map(lambda x, some=some: x[some], (settings, states))))
        for some in np.split(places, len(places) // FRAMES)
    ]
    return np.concatenate(made)[:count]


@jax.jit
def _pictures(settings: Setting, states: State) -> jax.Array:
    return view.pictures(jax.vmap(view.shapes)(settings, states))
