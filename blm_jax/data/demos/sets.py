"""A set of demonstrations read as a robot's entry says: what fits, and what an episode is in the robot's own units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from blm_jax.configfile import suggest
from blm_jax.data.demos.episodes import TASK, BadEpisode, Source
from blm_jax.data.demos.lerobot import LeRobot, is_lerobot
from blm_jax.data.demos.rlds import Rlds, rlds_directory
from blm_jax.data.demos.robots import Column, Dimension, Robot, take_columns
from blm_jax.data.files import one_line, open_path
from blm_jax.errors import RequestError


@dataclass(frozen=True)
class Episode:
    """The numbers of a demonstration, in the robot's units."""

    state: np.ndarray  # [observations, dims] float64
    action: np.ndarray  # [actions, dims] float64, absolute: of the observations from the first on
    instructions: list[str]  # [observations]


def open_set(path: epath.PathLike) -> Source:
    """A set of demonstrations, in whatever format."""
    place = open_path(path)
    if not place.is_dir():
        raise RequestError(f"{path} is no directory of demonstrations")
    if is_lerobot(place):
        return LeRobot(place)
    found = rlds_directory(place)
    if found is None:
        raise RequestError(f"{path} is no set of demonstrations: it holds neither LeRobot's meta/info.json nor an RLDS dataset_info.json")
    return Rlds(found)


def check_layout(source: Source, robot: Robot) -> None:
    """Refuses a set that does not hold what the robot's entry names."""
    whose = f"{source.path}, read as robot {robot.name}"
    for what, dimensions in (("state", robot.state), ("action", robot.action)):
        _check_columns(source, getattr(robot.columns, what), dimensions, f"{whose}: columns.{what}")
    for camera in robot.cameras:
        column = robot.camera_column(camera.name)
        if column not in source.cameras:
            near = suggest(column, source.cameras) or f"; it has {', '.join(source.cameras) or 'none'}"
            raise RequestError(f"{whose}: the set has no pictures {column}{near}: say in columns.cameras which are {camera.name}")
        size = source.cameras[column]
        if None not in size and size != (camera.height, camera.width):
            raise RequestError(
                f"{whose}: pictures {column} are {size[0]}x{size[1]} (height x width), camera {camera.name} is "
                f"{camera.height}x{camera.width}: give the camera the set's size"
            )
    if source.hz is not None and abs(source.hz - robot.hz) > 1e-6 * robot.hz:
        raise RequestError(f"{whose}: the set has {source.hz:g} steps a second, the robot {robot.hz:g}: say hz: {source.hz:g} in its entry")
    instruction_column(source, robot)


def _check_columns(source: Source, columns: Sequence[Column], dimensions: Sequence[Dimension], what: str) -> None:
    count = 0
    for column in columns:
        if column.name not in source.columns:
            near = suggest(column.name, source.columns) or f"; it has {', '.join(source.columns) or 'none'}"
            raise RequestError(f"{what}: the set has no column {column.name}{near}")
        size = source.columns[column.name]
        if column.take and max(column.take) >= size:
            raise RequestError(f"{what}: column {column.name} has {size} elements: there is no element {max(column.take)} to take")
        count += len(column.take) or size
    if count != len(dimensions):
        raise RequestError(f"{what}: {count} values for {len(dimensions)} dimensions: say with take which ones")


def instruction_column(source: Source, robot: Robot) -> str:
    """Where a set keeps the instruction: what the entry names, or the one text that the set has."""
    name = robot.columns.instruction
    if name in source.texts:
        return name
    if name == TASK and len(source.texts) == 1:
        return source.texts[0]
    near = suggest(name, source.texts) or f"; it has {', '.join(source.texts) or 'none'}"
    raise RequestError(f"{source.path}, read as robot {robot.name}: columns.instruction: the set has no text {name}{near}")


def read_episode(source: Source, robot: Robot, number: int) -> Episode:
    """Raises BadEpisode."""
    columns = [column.name for column in (*robot.columns.state, *robot.columns.action)]
    rows = source.read(number, columns, instruction_column(source, robot))
    try:
        state = take_columns(robot.columns.state, rows.values, robot.state)
        action = take_columns(robot.columns.action, rows.values, robot.action)[: rows.actions]
    except (RequestError, ValueError, TypeError) as error:
        raise BadEpisode(one_line(error)) from error
    if not len(action):
        raise BadEpisode("it has no action")
    for what, values, dimensions in (("state", state, robot.state), ("action", action, robot.action)):
        with np.errstate(over="ignore"):
            wrong = np.argwhere(~np.isfinite(values.astype(np.float32)))
        if len(wrong):
            step, i = wrong[0]
            raise BadEpisode(f"{what} {dimensions[i].name} is {values[step, i]:g} at step {step}")
    empty = [step for step, text in enumerate(rows.instructions[: len(action)]) if not text.strip()]
    if empty:
        raise BadEpisode(f"it has no instruction at step {empty[0]}")
    return Episode(state, action, rows.instructions)


def chunks(episode: Episode, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunk that begins at each action, [actions, horizon, dims], and its mask [actions, horizon]."""
    count = len(episode.action)
    padded = np.concatenate([episode.action, np.zeros((horizon - 1, episode.action.shape[1]))])
    found = np.lib.stride_tricks.sliding_window_view(padded, horizon, axis=0).swapaxes(1, 2)
    return found, np.arange(count)[:, None] + np.arange(horizon) < count


def read_pictures(source: Source, robot: Robot, number: int, camera: str, steps: Sequence[int]) -> np.ndarray:
    """[steps, height, width, 3] uint8 of the size that the robot's camera has. Raises BadEpisode."""
    column = robot.camera_column(camera)
    pictures = source.frames(number, column, steps)
    (wanted,) = [(one.height, one.width, 3) for one in robot.cameras if one.name == camera]
    if pictures.shape[1:] != wanted:
        raise BadEpisode(f"pictures {column} are {list(pictures.shape[1:])}, camera {camera} is {list(wanted)}")
    return pictures
