"""One step of Stage II: the policy learns from moments, the backbone stays as it is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from blm_jax.batch import IntentRows, Moments, Prompts
from blm_jax.models.bridge import Bridge
from blm_jax.models.mllm import Mllm
from blm_jax.models.objective import Losses, follow, losses
from blm_jax.models.policy import Policy


class Learner(NamedTuple):
    """All that a step changes."""

    policy: Policy
    slow: Bridge  # the bridge's slow copy, which says what the future tokens shall foresee
    optimizer: optax.OptState


def begin(policy: Policy, optimizer: optax.GradientTransformation) -> Learner:
    """The slow copy is a copy, as both are given away by a step that reuses their memory."""
    return Learner(policy, jax.tree.map(lambda leaf: leaf.copy(), policy.bridge), optimizer.init(policy))  # pyright: ignore[reportArgumentType]


def step(
    learner: Learner, backbone: Mllm | None, moments: Moments, key: jax.Array, optimizer: optax.GradientTransformation
) -> tuple[Learner, Losses]:
    """The backbone is frozen by being no argument of what is differentiated; moments whose intents were made before need none."""
    config = learner.policy.config

    def look(seen: Prompts | IntentRows) -> IntentRows:
        if isinstance(seen, IntentRows):
            return seen
        if backbone is None:
            raise ValueError("prompts are looked at by a backbone")
        return backbone.intent(seen, config.intent_block)

    seen, future = look(moments.seen), look(moments.future)
    keys = jax.random.split(key, moments.has_future.shape[0])

    def loss(policy: Policy) -> tuple[jax.Array, Losses]:
        found = losses(policy, learner.slow, seen, moments.robots, moments.chunks, future, moments.has_future, keys)
        return found.total(config.objective), found

    slopes, found = jax.grad(loss, has_aux=True)(learner.policy)
    updates, moved = optimizer.update(slopes, learner.optimizer, learner.policy)  # pyright: ignore[reportArgumentType]
    policy = optax.apply_updates(learner.policy, updates)  # pyright: ignore[reportArgumentType]
    return Learner(policy, follow(learner.slow, policy.bridge, config.objective.ema), moved), found  # pyright: ignore
