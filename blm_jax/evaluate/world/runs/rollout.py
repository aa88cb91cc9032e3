"""Episodes as they are run: thousands at once, in one compiled program a turn, on whatever mesh there is.

A turn is so many steps as a driver decides upon at once: a policy's chunk. Devices have rows of their own, and work on always as many of
them at a time, so that no product's shape depends on the mesh: an episode is the same on any of them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.evaluate.world import experts, physics, tasks
from blm_jax.evaluate.world.scene import Setting, State

HELD = 10  # steps, half a second: for so long a rule must have held in the end
MOST_STEPS = 2**20  # of an episode: what is drawn once has the key of no step


class Driver(Protocol):
    """Who moves the arms."""

    turn: int  # steps that are decided upon at once
    values: Any  # the same for all episodes: weights

    def begin(self, row: Any, setting: Setting, state: State) -> Any:
        """The memory of one episode; `row` is the driver's own, of this episode."""
        ...

    def decide(self, values: Any, rows: Any, settings: Setting, states: State, memory: Any, turn: jax.Array) -> Any:
        """The memories of many episodes, at the begin of a turn."""
        ...

    def act(self, values: Any, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """Of one episode, `step` counting from the turn's begin: the next action [JOINTS + 1], what is done in its place, the memory."""
        ...


class Scripted:
    """In turns that mean nothing to it. Its rows are seeds."""

    turn, values = 8, None

    def decide(self, values: Any, rows: Any, settings: Setting, states: State, memory: Any, turn: jax.Array) -> Any:
        return memory


class Expert(Scripted):
    """`noise` radians of each joint lead it astray, and what it does then shows the way back."""

    def __init__(self, noise: float = 0.0):
        self.values = np.float32(noise)

    def begin(self, row: Any, setting: Setting, state: State) -> Any:
        return experts.begin(setting, state), jnp.zeros_like(state.joints), row

    def act(self, values: Any, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        plan, off, seed = memory
        action, plan = experts.act(setting, state, plan)
        off = experts.drifted(plan, off, jax.random.fold_in(jax.random.key(seed), state.steps), values)
        return action, action.at[:-1].add(off), (plan, off, seed)


class Jolted(Expert):
    """Thrown off once, its gripper too. Its rows are a seed, and the first step after that."""

    STEPS, REACH = 5, 0.05  # and radians of each joint in each of them: by 5 cm (WidowX) to 12 cm (Panda) in all
    SHUT, OPEN = 0.3, 0.6  # of so many the gripper closes, of those up to there it opens

    def begin(self, row: Any, setting: Setting, state: State) -> Any:
        seed, after = row
        return super().begin(seed, setting, state), after

    def act(self, values: Any, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        own, after = memory
        action, done, own = super().act(values, setting, state, own, step)
        way, grip = jax.random.split(jax.random.fold_in(jax.random.key(own[2]), MOST_STEPS))
        chance = jax.random.uniform(grip)
        opening = jnp.where(chance < self.SHUT, 0.0, jnp.where(chance < self.OPEN, 1.0, action[-1]))
        thrown = jnp.append(state.joints + self.REACH * jax.random.normal(way, state.joints.shape), opening)
        jolted = (state.steps < after) & (state.steps >= after - self.STEPS)
        return action, jnp.where(jolted, thrown, done), (own, after)


class Still(Scripted):
    """Stays where it is."""

    def begin(self, row: jax.Array, setting: Setting, state: State) -> jax.Array:
        return jnp.append(state.joints, state.opening)

    def act(self, values: Any, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        return memory, memory, memory


class Random(Still):
    """Wanders: each turn to somewhere else near where it is then."""

    REACH = 0.5  # radians

    def decide(self, values: Any, rows: Any, settings: Setting, states: State, memory: Any, turn: jax.Array) -> Any:
        def one(row: jax.Array, state: State) -> jax.Array:
            way, grip = jax.random.split(jax.random.fold_in(jax.random.key(row), turn))
            joints = state.joints + jax.random.uniform(way, state.joints.shape, minval=-self.REACH, maxval=self.REACH)
            return jnp.append(joints, jax.random.uniform(grip))

        return jax.vmap(one)(rows, states)


class Progress(NamedTuple):
    """Of an episode."""

    state: State
    memory: Any
    held: jax.Array  # [] int32 steps for which the task's rule has held without a break
    first: jax.Array  # [] int32 the step after which it held for the first time, or -1


class Trace(NamedTuple):
    """What a step began with, and which action was taken."""

    state: State
    action: jax.Array  # [JOINTS + 1]
    held: jax.Array  # [] int32, as in `Progress`, after the step


@partial(jax.jit, static_argnums=0)
def started(driver: Driver, rows: Any, settings: Setting, states: State) -> Progress:
    count = states.held.shape
    memory = jax.vmap(driver.begin)(rows, settings, states)
    return Progress(states, memory, jnp.zeros(count, jnp.int32), jnp.full(count, -1, jnp.int32))


def _turn(
    driver: Driver, values: Any, rows: Any, settings: Setting, limits: jax.Array, at: Progress, turn: jax.Array
) -> tuple[Progress, Trace]:
    """Of the rows that are worked on at once. Traces have a leading axis of steps behind that of rows."""

    def one(setting: Setting, limit: jax.Array, before: Progress, step: jax.Array) -> tuple[Progress, Trace]:
        action, done, memory = driver.act(values, setting, before.state, before.memory, step)
        state = physics.step(setting, before.state, done)
        good = tasks.succeeded(setting, state)
        held = jnp.where(good, before.held + 1, 0)
        first = jnp.where((before.first < 0) & good, state.steps, before.first)
        after = Progress(state, memory, held, first)
        # An episode that is over stays as it is.
        going = before.state.steps < limit
        return jax.tree.map(lambda new, old: jnp.where(going, new, old), after, before), Trace(before.state, action, held)

    def step(before: Progress, number: jax.Array) -> tuple[Progress, Trace]:
        return jax.vmap(one, (0, 0, 0, None))(settings, limits, before, number)

    at = at._replace(memory=driver.decide(values, rows, settings, at.state, at.memory, turn))
    after, traces = jax.lax.scan(step, at, jnp.arange(driver.turn))
    return after, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), traces)


Turn = Callable[[Any, Any, Setting, Any, Progress, Any], tuple[Progress, Trace]]


def make_turn(driver: Driver, mesh: Mesh, at_once: int) -> Turn:
    """`turn(values, rows, settings, limits, progress, number)`, everything by rows but the first and the last."""

    def local(values: Any, rows: Any, settings: Setting, limits: jax.Array, at: Progress, turn: jax.Array) -> tuple[Progress, Trace]:
        def some(parts: Any) -> tuple[Progress, Trace]:
            rows, settings, limits, at = parts
            return _turn(driver, values, rows, settings, limits, at, turn)

        cut = jax.tree.map(lambda x: x.reshape(len(x) // at_once, at_once, *x.shape[1:]), (rows, settings, limits, at))
        return jax.tree.map(lambda x: x.reshape(len(x) * at_once, *x.shape[2:]), jax.lax.map(some, cut))

    everywhere, by_rows = meshes.copied(), meshes.by_rows()
    inputs = (everywhere, by_rows, by_rows, by_rows, by_rows, everywhere)
    return jax.jit(meshes.rows_apart(local, mesh, inputs, by_rows), donate_argnums=4)


def put(tree: Any, mesh: Mesh, own: list[int], count: int) -> Any:
    """Rows that this process holds, to its devices."""
    return meshes.put_rows(jax.tree.map(np.asarray, tree), mesh, own, count)
