"""What the parts of the small base that learn by themselves have in common: the loop around a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from blm_jax.evaluate.world.talk.recipe import Part

WARMUP, CLIP = 0.05, 1.0
TOLD = 50  # steps between those whose losses are told

Losses = dict[str, jax.Array]
Log = list[dict[str, float]]


def fitted(
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Losses]],
    state: Any,
    fixed: Any,
    batch: Callable[[np.random.Generator], Any],
    part: Part,
    seed: int,
    what: str,
) -> tuple[Any, Log]:
    """`state` after a part's steps, which make `loss(state, fixed, batch)` small, and the losses on the way."""
    state = jax.tree.map(jnp.copy, state)  # a step uses up what it is given
    rate = optax.warmup_cosine_decay_schedule(0, part.rate, int(WARMUP * part.steps), part.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, b2=0.98, weight_decay=0.01))
    moments = optimizer.init(state)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, moments: Any, fixed: Any, batch: Any) -> tuple[Any, Any, Losses]:
        (_, told), slopes = jax.value_and_grad(loss, has_aux=True)(state, fixed, batch)
        updates, moments = optimizer.update(slopes, moments, state)
        return optax.apply_updates(state, updates), moments, told

    draw, log = np.random.default_rng(seed), []
    bar = tqdm(range(part.steps), unit=" steps", desc=what, disable=None)
    for number in bar:
        state, moments, told = step(state, moments, fixed, batch(draw))
        if (number + 1) % TOLD == 0:
            losses = {name: float(value) for name, value in told.items()}
            log.append({"step": number + 1, **losses})
            bar.set_postfix({name: f"{value:.2f}" for name, value in losses.items()}, refresh=False)
    return state, log


def mean_where(there: Any, values: Any) -> jax.Array:
    return jnp.sum(values * there) / jnp.maximum(jnp.sum(there), 1)


def label_loss(there: Any, logits: jax.Array, meant: Any) -> jax.Array:
    """The mean where something is there and is known; what is not known is meant to be -1."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(jnp.asarray(meant), 0))
    return mean_where(there * (jnp.asarray(meant) >= 0), loss)
