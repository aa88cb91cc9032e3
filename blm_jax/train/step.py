"""One step of training, of either stage, on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.train.optimizer import abstract_state
from blm_jax.train.select import Tree
from blm_jax.train.stages import Share, Stage, Told


class State(NamedTuple):
    """All that a step changes."""

    params: Tree  # what is trained, float32
    slow: Tree | None  # Stage II: the bridge's slow copy, which says what the future tokens shall foresee
    optimizer: Any
    step: jax.Array
    skipped: jax.Array  # steps that were not finite, of the whole run
    in_a_row: jax.Array  # of them, the last ones without a good one between


class Report(NamedTuple):
    told: Told
    slope_norm: jax.Array  # before it is clipped
    rate: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


Step = Callable[[State, Tree, Any], tuple[State, Report]]
Evaluation = Callable[[State, Tree, Any], Told]


def abstract(params: Tree, slow: Tree | None, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes and places of all, before anything is made."""
    whole = meshes.everywhere(mesh)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return State(params, slow, abstract_state(optimizer, params, whole), count, count, count)


def begin(params: Tree, slow: Tree | None, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before the first step, made where it lives. All of it is copied: a step reuses the memory of what it is given."""
    shapes = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding))
    wanted = abstract(shapes(params), shapes(slow), optimizer, mesh)

    def make(params: Tree, slow: Tree | None) -> State:
        none = jnp.zeros((), jnp.int32)
        return State(params, slow, optimizer.init(params), none, none, none)

    with meshes.use(mesh):
        return jax.jit(make, out_shardings=shardings(wanted))(params, slow)


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: State,
    frozen: Tree,
    *,
    seed: int,
    parts: int = 1,
    rate: optax.Schedule | None = None,
) -> Step:
    """`state` and `frozen` may be shapes; `rate` is only told.

    The batch is worked on in so many `parts`, one after the other. Noise has the key of the row's place in the whole batch, and losses
    are divided by what all of it weighs, so the numbers are those of any other mesh and of any other number of parts.
    """
    places = shardings(state)
    rows, copies = meshes.by_rows(), meshes.copied()
    of_params, of_slow, of_frozen = (jax.tree.map(meshes.by_weight, tree) for tree in (state.params, state.slow, frozen))

    def slopes_of(params: Tree, slow: Tree | None, frozen: Tree, batch: Any, keys: jax.Array) -> tuple[Tree, Told]:
        keys = jax.random.wrap_key_data(keys)
        weights = meshes.total(stage.weigh(batch, keys))

        def one(part: tuple[Any, jax.Array]) -> tuple[Tree, Told]:
            return jax.grad(partial(stage.loss, train=True), has_aux=True)(params, frozen, slow, *part, weights)

        slopes, told = _added(one, (batch, keys), parts)
        return meshes.total_slopes(slopes, of_params), meshes.total(told)

    apart = meshes.rows_apart(slopes_of, mesh, (of_params, of_slow, of_frozen, rows, rows), (of_params, copies))

    def step(state: State, frozen: Tree, batch: Any) -> tuple[State, Report]:
        slopes, told = apart(state.params, state.slow, frozen, batch, row_keys(seed, state.step, stage.rows(batch)))
        norm = optax.tree.norm(slopes)
        updates, moments = optimizer.update(slopes, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        moved = params, stage.follow(state.slow, params), moments
        # A slope that is no number must not reach what is kept.
        good = jnp.isfinite(norm)
        params, slow, moments = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, (state.params, state.slow, state.optimizer))
        skipped, in_a_row = state.skipped + ~good, jnp.where(good, 0, state.in_a_row + 1)
        now = jnp.float32(0 if rate is None else rate(state.step - state.skipped))
        return State(params, slow, moments, state.step + 1, skipped, in_a_row), Report(told, norm, now, skipped, in_a_row)

    # What comes out lies where it lay: the compiler would choose otherwise, and refuse its own result in the next step.
    return jax.jit(step, donate_argnums=0, out_shardings=(places, meshes.everywhere(mesh)))


def make_evaluation(
    stage: Stage,
    mesh: Mesh,
    state: State,
    frozen: Tree,
    *,
    seed: int,
    parts: int = 1,
    compiler_options: dict[str, str] | None = None,
) -> Evaluation:
    """The losses of a batch, with the same noise each time; nothing changes."""
    rows, copies = meshes.by_rows(), meshes.copied()
    of_params, of_slow, of_frozen = (jax.tree.map(meshes.by_weight, tree) for tree in (state.params, state.slow, frozen))

    def look(params: Tree, slow: Tree | None, frozen: Tree, batch: Any, keys: jax.Array) -> Told:
        keys = jax.random.wrap_key_data(keys)
        weights = meshes.total(stage.weigh(batch, keys))
        told = _added(lambda part: stage.loss(params, frozen, slow, part[0], part[1], weights, train=False)[1], (batch, keys), parts)
        return meshes.total(told)

    apart = meshes.rows_apart(look, mesh, (of_params, of_slow, of_frozen, rows, rows), copies)

    def evaluate(state: State, frozen: Tree, batch: Any) -> Told:
        return apart(state.params, state.slow, frozen, batch, row_keys(seed, jnp.int32(-1), stage.rows(batch)))

    return jax.jit(evaluate, out_shardings=meshes.everywhere(mesh), compiler_options=compiler_options)


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """[rows, 2] uint32: a function of the seed, the step and the row's place in the whole batch."""
    return jax.random.key_data(jax.random.split(jax.random.fold_in(jax.random.key(seed), step), rows))


def _added(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """The sum of what `function` makes of parts of the rows, one after the other."""
    if parts == 1:
        return function(rows)
    cut = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), rows)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, jax.tree.map(lambda x: x[0], cut)))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), zeros, cut)[0]


def mean(share: Share) -> jax.Array:
    return share.sum / jnp.maximum(share.weight, 1)
