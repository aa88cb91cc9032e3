"""Episodes as they are run: thousands at once, in one compiled program a turn, on whatever mesh there is.

A turn is what a driver decides upon at once: a chunk of a policy, or one step of an expert. Devices have rows of their own, and
work on so many of them at a time that their number changes no product's shape: an episode is the same on any mesh, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.evaluate.world import experts, physics, tasks
from blm_jax.evaluate.world.scene import Setting, State

HELD = 10  # steps, half a second: for so long a rule must have held in the end


class Driver(Protocol):
    """Who moves the arms. Without `values` and rows of its own, it needs the episode's alone."""

    turn: int  # steps that are decided upon at once
    values: Any  # the same for all episodes: weights

    def begin(self, setting: Setting, state: State) -> Any:
        """The memory of one episode."""
        ...

    def decide(self, values: Any, rows: Any, settings: Setting, states: State, memory: Any, turn: jax.Array) -> Any:
        """The memories of many episodes, at the begin of a turn. `rows` are the driver's own, one an episode."""
        ...

    def act(self, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, Any]:
        """The next action [JOINTS + 1] of one episode, `step` counting from the turn's begin."""
        ...


class Expert:
    """The scripted one. `noise` radians of each joint lead it astray, and what it does then shows the way back; `rows` are seeds."""

    turn, values = 8, None

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def begin(self, setting: Setting, state: State) -> Any:
        return experts.begin(setting, state), jnp.zeros_like(state.joints), jnp.int32(0)

    def decide(self, values: Any, rows: Any, settings: Setting, states: State, memory: Any, turn: jax.Array) -> Any:
        plan, off, _ = memory
        return plan, off, rows

    def act(self, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, Any]:
        plan, off, seed = memory
        action, plan = experts.act(setting, state, plan)
        off = experts.drifted(plan, off, jax.random.fold_in(jax.random.key(seed), state.steps), self.noise)
        return action, (plan, off, seed)

    @staticmethod
    def executed(action: jax.Array, memory: Any) -> jax.Array:
        return action.at[:-1].add(memory[1])


class Still:
    """Stays where it is."""

    turn, values = 1, None

    def begin(self, setting: Setting, state: State) -> Any:
        return jnp.append(state.joints, state.opening)

    def decide(self, values: Any, rows: Any, settings: Setting, states: State, memory: Any, turn: jax.Array) -> Any:
        return memory

    def act(self, setting: Setting, state: State, memory: Any, step: jax.Array) -> tuple[jax.Array, Any]:
        return memory, memory


class Random(Still):
    """Wanders: to somewhere near where it is, for eight steps, then to somewhere else. `rows` are seeds."""

    turn = 8
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
    """What a step began with, and what was done."""

    state: State
    action: jax.Array  # [JOINTS + 1]
    held: jax.Array  # [] int32, as in `Progress`, after the step


def started(driver: Driver, settings: Setting, states: State) -> Progress:
    count = states.held.shape
    memory = jax.vmap(driver.begin)(settings, states)
    return Progress(states, memory, jnp.zeros(count, jnp.int32), jnp.full(count, -1, jnp.int32))


def _turn(
    driver: Driver, values: Any, rows: Any, settings: Setting, limits: jax.Array, at: Progress, turn: jax.Array
) -> tuple[Progress, Trace]:
    """Of the rows that are worked on at once. Traces have a leading axis of steps behind that of rows."""
    executed = getattr(driver, "executed", lambda action, memory: action)

    def one(setting: Setting, limit: jax.Array, before: Progress, step: jax.Array) -> tuple[Progress, Trace]:
        action, memory = driver.act(setting, before.state, before.memory, step)
        state = physics.step(setting, before.state, executed(action, memory))
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
