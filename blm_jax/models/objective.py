"""Paths from noise to actions, the losses that learn them, and the sampler that follows them.

A path mixes actions and noise, x(t) = alpha(t) actions + sigma(t) noise, from noise at time 0 to actions at time 1. Each of those
here is one table: how it mixes, what of x the network is shown, what it learns to say, what an error in that weighs, and which actions it
foretells. Given these, losses and sampler are the same: flow matching with Euler steps, and diffusion with DDIM's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.batch import Chunks, IntentRows, RobotRows
from blm_jax.config import ObjectiveConfig, Path
from blm_jax.models.bridge import Bridge
from blm_jax.models.policy import Condition, Policy

Mix = tuple[jax.Array, jax.Array]  # alpha and sigma


class PathTable(NamedTuple):
    mix: Callable[[jax.Array], Mix]
    target: Callable[[jax.Array, jax.Array, Mix], jax.Array]  # actions, noise -> what the network learns to say
    foretold: Callable[[jax.Array, jax.Array, Mix], jax.Array]  # x, what it says -> actions at time 1
    time: Callable[[jax.Array, ObjectiveConfig], jax.Array]  # key -> a time to train at
    weight: Callable[[Mix], jax.Array]  # of an error in what it says
    shown: Callable[[Mix], jax.Array]  # what x is multiplied by for the network to see; given steps are seen as they are


def _beta_time(key: jax.Array, config: ObjectiveConfig) -> jax.Array:
    drawn = jax.random.beta(key, *config.beta)
    return jnp.clip((config.beta_span - drawn) / config.beta_span, 0, 1)


def _one(mix: Mix) -> jax.Array:
    return jnp.ones_like(mix[1])


OPEN = 0.07  # "clean": how far an observation leaves actions open, of their spread
LEAST = 1e-3  # noise that is divided by


def _kept(mix: Mix) -> jax.Array:
    """How much of x is in the actions that "clean" foretells: as much as it tells of actions that spread by OPEN, so hardly any before
    its noise is less than that."""
    alpha, sigma = mix
    return alpha * OPEN**2 / (alpha**2 * OPEN**2 + sigma**2)


PATHS: dict[Path, PathTable] = {
    "flow": PathTable(
        mix=lambda t: (t, 1 - t),
        target=lambda actions, noise, mix: actions - noise,
        foretold=lambda x, said, mix: x + mix[1] * said,
        time=_beta_time,
        weight=_one,
        shown=_one,
    ),
    # Flow's way, with the network saying the actions: where an observation all but decides them, a small network need not learn to pass
    # on the noise that it is shown, to more digits than actions have. Near the end, where x is nearly the actions, x itself is passed on.
    # For the same reason it is shown x only as far as x tells of actions. An error weighs what it does to the actions that are foretold.
    # Where an observation leaves several ways to act open, x says which: there this path takes more steps to learn than flow.
    "clean": PathTable(
        mix=lambda t: (t, 1 - t),
        target=lambda actions, noise, mix: actions - mix[0] * OPEN**2 / jnp.maximum(mix[1], LEAST) * noise,
        foretold=lambda x, said, mix: _kept(mix) * x + (1 - _kept(mix) * mix[0]) * said,
        time=_beta_time,
        weight=lambda mix: (1 - _kept(mix) * mix[0]) ** 2,
        shown=_kept,
    ),
    # The cosine schedule, with the network saying v (Salimans and Ho 2022), which is well behaved at pure noise too.
    "ddim": PathTable(
        mix=lambda t: (jnp.sin(jnp.pi / 2 * t), jnp.cos(jnp.pi / 2 * t)),
        target=lambda actions, noise, mix: mix[0] * noise - mix[1] * actions,
        foretold=lambda x, said, mix: mix[0] * x - mix[1] * said,
        time=lambda key, config: jax.random.uniform(key),
        weight=_one,
        shown=_one,
    ),
}


class Losses(NamedTuple):
    """By row, so that they can be told apart by robot and task; means are over the weights of all rows together."""

    action: jax.Array  # [rows] squared errors, summed
    action_weight: jax.Array  # [rows] how many
    future: jax.Array  # [rows] 1 - cosine, summed
    future_weight: jax.Array  # [rows]

    def means(self) -> tuple[jax.Array, jax.Array]:
        action = self.action.sum() / jnp.maximum(self.action_weight.sum(), 1)
        return action, self.future.sum() / jnp.maximum(self.future_weight.sum(), 1)

    def total(self, config: ObjectiveConfig) -> jax.Array:
        action, future = self.means()
        return action + config.future_weight * future


def losses(
    policy: Policy,
    target: Bridge,
    intent: IntentRows,
    robots: RobotRows,
    chunks: Chunks,
    future: IntentRows,
    has_future: jax.Array | np.ndarray,
    keys: jax.Array,
    *,
    train: bool = True,
) -> Losses:
    """`target` is the bridge's slow copy; has_future [rows] bool: false past an episode's end. keys [rows], one an example."""
    config = policy.config.objective
    path = PATHS[config.path]
    rows, horizon, width = chunks.actions.shape
    dropout_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    hide = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), policy.config.embodiment.state_dropout))(keys)
    condition = policy.condition(intent, robots, hide if train else None)

    time, noise, given = _draws(config, keys, horizon, width)
    actions, mask = (jnp.repeat(x, config.draws, axis=0) for x in (chunks.actions, chunks.mask))
    actions = jnp.where(mask, actions, 0)
    mix = jax.tree.map(lambda x: x[:, None, None], path.mix(time))
    seen = path.shown(mix) * (mix[0] * actions + mix[1] * noise)
    if config.prefix:
        seen = jnp.where(given[..., None], actions, seen)
        mask = mask & ~given[..., None]
    said = policy.velocity(
        condition,
        seen,
        time,
        given if config.prefix else None,
        jnp.repeat(dropout_keys, config.draws, axis=0) if train and policy.config.dit.dropout else None,
    )
    error = jnp.where(mask, path.weight(mix) * (said.actions - path.target(actions, noise, mix)) ** 2, 0)

    # The future is the slow copy's, and no gradient reaches it.
    wanted = jax.lax.stop_gradient(target(future)).astype(jnp.float32)
    wanted = jnp.where(has_future[:, None, None], wanted, 0)  # before the cosine: its gradient would carry a NaN past a mask
    distance = 1 - cosine(said.future.reshape(rows, config.draws, *wanted.shape[1:]), wanted[:, None])
    distance = jnp.where(has_future, distance.mean(axis=(1, 2)), 0)
    return Losses(
        action=error.reshape(rows, -1).sum(axis=1),
        action_weight=mask.reshape(rows, -1).sum(axis=1).astype(jnp.float32),
        future=distance,
        future_weight=jnp.asarray(has_future, jnp.float32),
    )


def _draws(config: ObjectiveConfig, keys: jax.Array, horizon: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row `draws` times: a time, noise, and which steps are given."""
    keys = _draw_keys(config, keys)
    time = jax.vmap(lambda key: PATHS[config.path].time(key, config))(keys[:, 0])
    return time, jax.vmap(lambda key: jax.random.normal(key, (horizon, width)))(keys[:, 1]), _given(config, keys, horizon)


def _draw_keys(config: ObjectiveConfig, keys: jax.Array) -> jax.Array:
    """[rows * draws, 3]: for a time, for noise, and for what is given."""
    each = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2), config.draws))(keys).reshape(-1)
    return jax.vmap(lambda key: jax.random.split(key, 3))(each)


def _given(config: ObjectiveConfig, keys: jax.Array, horizon: int) -> jax.Array:
    count = jax.vmap(lambda key: jax.random.randint(key, (), 0, config.prefix + 1))(keys[:, 2])
    return jnp.arange(horizon) < count[:, None]


def loss_weights(config: ObjectiveConfig, chunks: Chunks, has_future: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `Losses.means` of these rows will divide by, without the policy: rows on several devices share their divisors."""
    counted = jnp.repeat(chunks.mask, config.draws, axis=0)
    if config.prefix:
        counted &= ~_given(config, _draw_keys(config, keys), chunks.mask.shape[1])[..., None]
    return counted.sum().astype(jnp.float32), has_future.sum().astype(jnp.float32)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum(x * y, axis=-1) * jax.lax.rsqrt(jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1) + 1e-12)


def follow(slow: Bridge, bridge: Bridge, decay: float) -> Bridge:
    """The slow copy after one more step: a bridge that were its own target could agree with itself by saying nothing."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, slow, bridge)


class Committed(NamedTuple):
    """Steps of the chunk that are decided, when chunks are made while the robot moves.

    The first `delay` steps are executed before the new chunk is ready. Those after it, while the last chunk has any, are
    wishes whose weight fades.
    """

    actions: jax.Array  # [rows * samples, horizon, action_width], normalised; the last chunk, moved to the new one's start
    delay: jax.Array  # [] int32
    overlap: jax.Array  # [] int32: how many steps of the last chunk are left, at least `delay`


def sample(
    policy: Policy,
    condition: Condition,
    noise: jax.Array,
    steps: int,
    committed: Committed | None = None,
    *,
    guided: bool = True,
    strength: float = 5.0,
) -> jax.Array:
    """noise [rows * samples, horizon, action_width] -> actions, normalised. One loop; nothing of the observation is made again.

    With `committed`, a policy trained with prefixes is given the decided steps (`guided` false); any other is guided towards
    them (real-time chunking, Black et al. 2025: the gradient of the foretold actions' distance, through the denoiser).
    """
    path = PATHS[policy.config.objective.path]
    samples = noise.shape[0] // condition.state.shape[0]
    mask = jnp.repeat(condition.mask, samples, axis=0)
    horizon = noise.shape[1]
    decided = None if committed is None else (jnp.arange(horizon) < committed.delay)[None, :, None]
    given = None if decided is None or guided else decided[..., 0]

    # Divided here and now: a compiler may multiply by 1 / steps, and end in the neighbouring bucket.
    times = jnp.asarray(np.arange(steps + 1, dtype=np.float32) / np.float32(steps))

    def foretell(x: jax.Array, time: jax.Array) -> jax.Array:
        mix = path.mix(time)
        seen = path.shown(mix) * x
        if given is not None:
            seen = jnp.where(given[..., None], x, seen)
        return path.foretold(x, policy.velocity(condition, seen, time[None], given).actions, mix)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        time, after = times[i], times[i + 1]
        (alpha, sigma), (alpha_after, sigma_after) = path.mix(time), path.mix(after)
        if committed is None or not guided:
            if given is not None and committed is not None:
                x = jnp.where(given[..., None], committed.actions, x)
            actions = foretell(x, time)
        else:
            actions, pull = jax.vjp(lambda x: foretell(x, time), x)
            wish = soft_mask(committed, horizon)[None, :, None] * jnp.where(mask, committed.actions - actions, 0)
            # The variance of actions given x, for actions of unit variance; the gain is bounded where it would explode.
            variance = sigma**2 / (alpha**2 + sigma**2)
            gain = jnp.minimum(strength, sigma / jnp.maximum(alpha * variance, 1e-6))
            actions = actions + sigma * gain * pull(wish)[0]
        return alpha_after * actions + sigma_after * (x - alpha * actions) / sigma

    actions = jax.lax.fori_loop(0, steps, step, jnp.where(mask, noise, 0))
    if committed is not None and decided is not None:
        actions = jnp.where(decided, committed.actions, actions)
    return jnp.where(mask, actions, 0)


def soft_mask(committed: Committed, horizon: int) -> jax.Array:
    """[horizon] 1 on decided steps, fading over the rest of the last chunk, 0 beyond it."""
    place = jnp.arange(horizon)
    fade = (committed.overlap - place) / (committed.overlap - committed.delay + 1)
    fade = fade * jnp.expm1(fade) / (jnp.e - 1)
    return jnp.where(place < committed.delay, 1.0, jnp.where(place < committed.overlap, fade, 0.0))
