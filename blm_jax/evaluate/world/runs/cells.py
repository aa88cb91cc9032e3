"""Which episodes are run: so many of each cell, a robot and a task. An episode is decided by the seed, its cell and its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.configfile import suggest
from blm_jax.errors import RequestError
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.scene import Setting, State
from blm_jax.evaluate.world.tasks import TASKS

EVALUATION, DEMONSTRATION = 1, 2  # episodes of one are never those of the other
PREFIX = "world_"  # of these robots' names in the registry
MOST = 2**13  # episodes of a cell whose serials differ


class Episodes(NamedTuple):
    """A row an episode."""

    robot: np.ndarray  # [rows] int32, of ROBOTS
    task: np.ndarray  # [rows] int32, of TASKS
    number: np.ndarray  # [rows] int32, within its cell

    def part(self, rows: Sequence[int] | np.ndarray) -> Episodes:
        return Episodes(*(values[rows] for values in self))

    @property
    def serial(self) -> np.ndarray:
        """[rows] int32, another one for each episode of all cells."""
        return (self.robot * len(TASKS) + self.task) * MOST + self.number % MOST


def chosen(given: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Names out of a list with commas; all if none is given."""
    names = tuple(known) if given is None else tuple(name.strip() for name in given.split(","))
    for name in names:
        if name not in known:
            raise RequestError(f"the world has no {what} {name!r}{suggest(name, known) or '; it has ' + ', '.join(known)}")
    if len(set(names)) < len(names):
        raise RequestError(f"{', '.join(names)} names a {what} twice")
    return names


def episodes_of(robots: Sequence[str], wanted: Sequence[str], count: int, first: int = 0) -> Episodes:
    """`count` of each cell, from number `first` on; cell after cell, so that rows of a batch are much alike."""
    cells = [(ROBOTS.index(robot), TASKS.index(task)) for robot in robots for task in wanted]
    robot, task = np.repeat(np.array(cells, np.int32), count, axis=0).T
    return Episodes(robot, task, np.tile(np.arange(first, first + count, dtype=np.int32), len(cells)))


@partial(jax.jit, static_argnames="kind")
def begin(seed: Any, robot: jax.Array, task: jax.Array, number: jax.Array, *, kind: int, two: Any) -> tuple[Setting, State]:
    """Of many episodes. With `two`, of each or of all, two cubes lie where one would, and the instruction alone says which is meant."""

    def one(robot: jax.Array, task: jax.Array, number: jax.Array, two: jax.Array) -> tuple[Setting, State]:
        key = jax.random.key(seed)
        for part in (jnp.int32(kind), robot, task, number):
            key = jax.random.fold_in(key, part)
        return tasks.reset(key, robot, task, two)

    return jax.vmap(one)(robot, task, number, jnp.broadcast_to(two, np.shape(number)))


asked = jax.jit(jax.vmap(tasks.asked))


def instructions(settings: Setting, numbers: np.ndarray) -> list[str]:
    """In words; the wordings of a task take turns."""
    rows = np.asarray(asked(settings)).tolist()
    return [tasks.instruction(*row, wording=number) for row, number in zip(rows, numbers.tolist(), strict=True)]
