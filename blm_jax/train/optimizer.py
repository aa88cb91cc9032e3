"""AdamW, with moments in as many bits as asked for, and rates by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from blm_jax.mesh import of_one_number_a_row
from blm_jax.recipe import Moments, OptimizerConfig
from blm_jax.train.select import Tree
from blm_jax.weights.names import leaves, nested

SCALES = ("scale", "bias")  # leaves that are no matrices: not decayed


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of each step: up to its height, then down to the floor, which one step more would reach."""
    warm = round(config.warmup * steps)
    height, floor = config.rate, config.rate * config.floor
    rest = max(1, steps - warm)
    down = {
        "cosine": optax.cosine_decay_schedule(height, rest, config.floor),
        "linear": optax.linear_schedule(height, floor, rest),
        "constant": optax.constant_schedule(height),
    }[config.schedule]
    if not warm:
        return down
    return optax.join_schedules([optax.linear_schedule(height / warm, height, warm - 1), down], [warm])


def make_optimizer(
    config: OptimizerConfig, steps: int, rate_of: Mapping[str, float], allowed: Tree | None = None
) -> optax.GradientTransformation:
    """`rate_of` the names of parameters, `allowed` a tree of bool that broadcast to them: of what is false nothing moves."""
    clip = optax.clip_by_global_norm(config.clip)
    parts = [
        clip,
        scale_by_adam(*config.betas, config.eps, config.moments),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        _scale_by(rate_of),
        optax.scale_by_learning_rate(schedule(config, steps)),
    ]
    if allowed is not None:

        def moving(updates: Any) -> Any:
            return jax.tree.map(lambda update, may: jnp.where(may, update, 0), updates, allowed)

        # What stays has no say in how far the rest is clipped, and does not decay. A state stays one, or older runs would not go on.
        parts[0] = optax.stateless(lambda slopes, _: clip.update(moving(slopes), optax.EmptyState())[0])
        parts.append(optax.stateless(lambda updates, _: moving(updates)))
    return optax.chain(*parts)


def _decayed(params: Tree) -> Tree:
    return nested({path: path[-1] not in SCALES for path, _ in leaves(params)})


def _scale_by(rate_of: Mapping[str, float]) -> optax.GradientTransformation:
    def scale(updates: Any, _: Any) -> Any:
        return nested({path: update * rate_of[".".join(path)] for path, update in leaves(updates)})

    return optax.stateless(scale)


# --- moments -----------------------------------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """Numbers in eight bits, the largest of each row at the end of the scale."""

    values: jax.Array
    scale: jax.Array  # [..., 1]


class AdamState(NamedTuple):
    count: jax.Array
    mean: Any
    square: Any


def scale_by_adam(b1: float, b2: float, eps: float, form: Moments) -> optax.GradientTransformation:
    """Adam's direction. Where moments have few bits they are rounded by chance: one that grows by less than half a bit a step would
    never move otherwise. In eight bits the root of the mean square is kept, and never as 0 where it is not: the division stays tame."""

    def init(params: Any) -> AdamState:
        zeros = jax.tree.map(lambda leaf: _pack(jnp.zeros(leaf.shape, jnp.float32), form, signed=True, key=None), params)
        roots = jax.tree.map(lambda leaf: _pack(jnp.zeros(leaf.shape, jnp.float32), form, signed=False, key=None), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, roots)

    def update(slopes: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        count = state.count + 1
        flat, tree = jax.tree.flatten(slopes)
        means, squares = tree.flatten_up_to(state.mean), tree.flatten_up_to(state.square)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), (2, len(flat)))
        found = []
        for i, (slope, mean, square) in enumerate(zip(flat, means, squares, strict=True)):
            mean = b1 * _unpack(mean, signed=True) + (1 - b1) * slope
            square = b2 * _unpack(square, signed=False) + (1 - b2) * slope**2
            step = mean / (1 - b1**count) / (jnp.sqrt(square / (1 - b2**count)) + eps)
            found.append((step, _pack(mean, form, signed=True, key=keys[0, i]), _pack(square, form, signed=False, key=keys[1, i])))
        steps, means, squares = (tree.unflatten(part) for part in zip(*found, strict=True))
        return steps, AdamState(count, means, squares)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _pack(x: jax.Array, form: Moments, *, signed: bool, key: jax.Array | None) -> Any:
    if form == "float32":
        return x
    if form == "bfloat16":
        return _by_chance(x, key) if key is not None else x.astype(jnp.bfloat16)
    x = x if signed else jnp.sqrt(x)
    most = 127.0 if signed else 255.0
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x * (most / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny))
    noise = 0.5 if key is None else jax.random.uniform(key, x.shape)
    levels = jnp.clip(jnp.floor(scaled + noise), -most, most)
    if not signed:
        levels = jnp.where(x > 0, jnp.maximum(levels, 1), 0)
    return Levels(levels.astype(jnp.int8 if signed else jnp.uint8), largest / most)


def _unpack(kept: Any, *, signed: bool) -> jax.Array:
    if isinstance(kept, Levels):
        x = kept.values.astype(jnp.float32) * kept.scale
        return x if signed else x**2
    return kept.astype(jnp.float32)


def _by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
    """To bfloat16, up or down with the odds that keep the expectation: noise is added to the bits that will be cut."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


# --- where it lives ----------------------------------------------------------------------------------------------------------


def abstract_state(optimizer: optax.GradientTransformation, params: Tree, whole: NamedSharding) -> Any:
    """Shapes of the optimizer's state: what is a parameter's own lies as the parameter does, anything else (`whole`) everywhere."""
    places = {path: leaf.sharding for path, leaf in leaves(params)}

    def place(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        path = tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        found = places.get(path)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole if found is None else of_one_number_a_row(found, leaf.shape))

    return jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))


def count_bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
