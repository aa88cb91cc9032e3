"""What the parts of the small base that learn by themselves have in common: the loop around a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from tqdm import tqdm

from blm_jax.evaluate.world.talk.recipe import Part

WARMUP, CLIP, DECAY = 0.05, 1.0, 0.01
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
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), _muon(rate))
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


def _muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Of kernels, steps that are orthogonal matrices (Jordan 2024), as large as AdamW's (Liu et al. 2025), and AdamW's of all else."""
    return optax.contrib.muon(
        rate,
        weight_decay=DECAY,
        consistent_rms=0.2,
        adam_b2=0.98,
        adam_weight_decay=DECAY,
        muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(_axes, params),
    )


def _axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """Those of a kernel that it sums over, and those that it makes; None for what is no kernel of the model's own."""
    names = [getattr(key, "key", None) for key in path]
    if names[-1] != "kernel" or names[0] == "heads":
        return None
    first = int("blocks" in names)  # layers lie along the first axis, and q, k and v may along one more
    sums = (first, first + 1) if names[-2] == "out" and leaf.ndim - first == 3 else (first,)
    makes = tuple(range(sums[-1] + 1, leaf.ndim))[names[-2] == "qkv" :]
    return optax.contrib.MuonDimensionNumbers(sums, makes)


def mean_where(there: Any, values: Any) -> jax.Array:
    return jnp.sum(values * there) / jnp.maximum(jnp.sum(there), 1)


def label_loss(there: Any, logits: jax.Array, meant: Any) -> jax.Array:
    """The mean where something is there and is known; what is not known is meant to be -1."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(jnp.asarray(meant), 0))
    return mean_where(there * (jnp.asarray(meant) >= 0), loss)
