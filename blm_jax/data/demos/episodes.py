"""What a recorded episode is, whatever the format of the files it lies in.

A source reads a set of demonstrations: numbers by column, pictures by camera, both under the names that the set gives them.
`demonstrations.py` reads a source as a robot's entry says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from etils import epath

from blm_jax.data.demos.robots import Robot
from blm_jax.errors import RequestError

TASK = "task"  # the column of instructions, if a robot's entry names no other


class BadEpisode(Exception):
    """An episode that cannot be used, and why, in one line."""


@dataclass(frozen=True)
class Rows:
    """The steps of one episode, as the set keeps them."""

    values: dict[str, np.ndarray]  # [steps, elements] or [steps], by column
    instructions: list[str]  # [steps]
    actions: int  # steps, counted from the first, whose action was taken: in RLDS, the last one's was not


class Source(Protocol):
    """A set of demonstrations on disk. It may be pickled: files are opened where they are read."""

    path: epath.Path
    count: int  # episodes
    hz: float | None  # steps a second, where the set says so
    columns: Mapping[str, int]  # of numbers: how many a step
    cameras: Mapping[str, tuple[int | None, int | None]]  # height and width, where the set says so
    texts: Sequence[str]  # columns that may hold the instruction

    @property
    def identity(self) -> str:
        """Another one where the set was changed, the same wherever it lies. Asks for the size of every file."""
        ...

    def read(self, episode: int, columns: Sequence[str], instruction: str) -> Rows:
        """Numbers and instructions; no picture is read. Raises BadEpisode."""
        ...

    def check_frames(self, episode: int, camera: str) -> None:
        """Raises BadEpisode where pictures of an episode are missing; decodes none."""
        ...

    def frames(self, episode: int, camera: str, steps: Sequence[int]) -> np.ndarray:
        """[len(steps), height, width, 3] uint8. Raises BadEpisode."""
        ...


@dataclass(frozen=True)
class Recording:
    """An episode to be written. An observation more than there are actions is the one after the last of them."""

    instruction: str
    state: np.ndarray  # [observations, dims]
    action: np.ndarray  # [actions, dims]
    images: Mapping[str, np.ndarray]  # [observations, height, width, 3] uint8 by camera


def check_recording(recording: Recording, robot: Robot, number: int) -> None:
    """Refuses what would be read back as a bad episode."""
    observations, actions = len(recording.state), len(recording.action)
    what = f"episode {number} of {robot.name}"
    if recording.state.shape != (observations, len(robot.state)) or recording.action.shape != (actions, len(robot.action)):
        raise RequestError(
            f"{what}: state and action are {list(recording.state.shape)} and {list(recording.action.shape)}, "
            f"not [observations, {len(robot.state)}] and [actions, {len(robot.action)}]"
        )
    if actions == 0 or observations - actions not in (0, 1):
        raise RequestError(f"{what}: {observations} observations and {actions} actions: there must be as many, or one observation more")
    with np.errstate(over="ignore"):
        written = [values.astype(np.float32) for values in (recording.state, recording.action)]
    if not all(np.isfinite(values).all() for values in written):
        raise RequestError(f"{what} holds numbers that are not finite in float32, as which they are written")
    if not recording.instruction.strip():
        raise RequestError(f"{what} has no instruction")
    for camera in robot.cameras:
        found = recording.images.get(camera.name)
        wanted = (observations, camera.height, camera.width, 3)
        if found is None or found.shape != wanted or found.dtype != np.uint8:
            said = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise RequestError(f"{what}: the pictures of camera {camera.name} are {said}, not uint8 {list(wanted)}")


EDGE = 2**16  # bytes
LOOKED_INTO = 256  # files
Mark = tuple[int, str] | None  # size; digest, if the file was looked into


def marks(files: Mapping[str, epath.Path]) -> list[tuple[str, Mark]]:
    """What tells files from others of their names: the size of each, and what stands at both ends of some, evenly spread."""
    names = sorted(files)
    step = -(-len(names) // LOOKED_INTO) or 1
    with ThreadPoolExecutor(16) as pool:  # in a bucket, each answer takes long
        found = pool.map(lambda i: _mark(files[names[i]], look=i % step == 0), range(len(names)))
        return list(zip(names, found, strict=True))


def _mark(path: epath.Path, *, look: bool) -> Mark:
    """None of a file that cannot be read: its episodes are bad."""
    try:
        size = path.stat().length
        if not look:
            return size, ""
        with path.open("rb") as stream:
            edges = stream.read(EDGE)
            if size > EDGE:
                stream.seek(max(EDGE, size - EDGE))
                edges += stream.read(EDGE)
    except (OSError, ValueError):
        return None
    return size, hashlib.sha256(edges).hexdigest()


Stamp = tuple[int, int] | None


def stamp(path: epath.PathLike) -> Stamp:
    """What tells a file from another that took its name: part of the keys of caches. Files in buckets are taken not to change."""
    if "://" in os.fspath(path):
        return None
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size
