"""Robots: what each one's state, action and cameras are. A robot is an entry in a YAML file, the package's or the user's."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blm_jax import configfile
from blm_jax.configfile import suggest
from blm_jax.errors import RequestError

OURS = Path(__file__).with_name("robots.yaml")
NAME = re.compile(r"[A-Za-z0-9_.-]+")  # names are keys of files and words of the command line
IMAGES = "observation.images."  # where a LeRobot data set keeps a camera's pictures

Unit = Literal["rad", "m", "opening"]
Kind = Literal["joint", "gripper"]
Control = Literal["joint_position"]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RequestError(message)


def _check_name(what: str, name: str) -> None:
    _check(bool(NAME.fullmatch(name)), f"{what} {name!r}: a name is made of letters, digits, '_', '-' and '.'")


def _check_different(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    _check(not twice, f"{what} {', '.join(twice)} is given twice")


@dataclass(frozen=True)
class Dimension:
    """One number of a state or an action."""

    name: str
    unit: Unit
    low: float
    high: float
    kind: Kind = "joint"

    def __post_init__(self) -> None:
        _check_name("dimension", self.name)
        limits = f"{self.low} to {self.high}"
        _check(
            math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high,
            f"dimension {self.name}: limits of {limits} hold nothing: low must lie below high, and both be finite",
        )
        _check(
            (self.kind == "gripper") == (self.unit == "opening"),
            f"dimension {self.name}: kind {self.kind} with unit {self.unit}: grippers, and nothing else, are measured as an opening",
        )
        _check(
            self.kind != "gripper" or (self.low, self.high) == (0, 1),
            f"dimension {self.name}: a gripper is an opening from 0 (closed) to 1 (open), not from {limits}; scale it in columns",
        )


@dataclass(frozen=True)
class Camera:
    name: str
    height: int
    width: int

    def __post_init__(self) -> None:
        _check_name("camera", self.name)
        _check(min(self.height, self.width) > 0, f"camera {self.name}: {self.height}x{self.width} pixels are no picture")


@dataclass(frozen=True)
class Column:
    """A column of a data set: ours = scale * theirs + offset."""

    name: str
    take: tuple[int, ...] = ()  # elements of the column; all of them if none is named
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        _check(all(index >= 0 for index in self.take), f"column {self.name}: take {list(self.take)} counts from 0")
        finite = math.isfinite(self.scale) and math.isfinite(self.offset)
        _check(finite and self.scale != 0, f"column {self.name}: scale {self.scale} and offset {self.offset} lose the values")


@dataclass(frozen=True)
class Columns:
    """Where a data set keeps a robot's numbers and pictures. Columns of a state or an action are put side by side."""

    state: tuple[Column, ...] = (Column("observation.state"),)
    action: tuple[Column, ...] = (Column("action"),)
    cameras: dict[str, str] = field(default_factory=dict)  # our camera to the data set's; one not named here is observation.images.NAME
    instruction: str = "task"


@dataclass(frozen=True)
class Robot:
    name: str
    state: tuple[Dimension, ...]
    action: tuple[Dimension, ...]
    cameras: tuple[Camera, ...]  # in the order in which the model sees them
    control: Control = "joint_position"
    relative: bool = True  # joints of a chunk are relative to the state at its start; grippers are absolute always
    hz: float = 20.0
    horizon: int = 16  # steps of a chunk
    executed: int = 8  # of them, before the next chunk is asked for
    columns: Columns = Columns()

    def __post_init__(self) -> None:
        _check_name("robot", self.name)
        for what, parts in (("state", self.state), ("action", self.action), ("camera", self.cameras)):
            _check(len(parts) > 0, f"robot {self.name} has no {what}")
            _check_different(f"robot {self.name}: {what}", (part.name for part in parts))
        _check(0 < self.hz < math.inf, f"robot {self.name}: hz is {self.hz}: it must be above 0")
        _check(
            1 <= self.executed <= self.horizon,
            f"robot {self.name}: executed is {self.executed}: it must be at least 1 and at most the horizon of {self.horizon}",
        )
        self._check_relative()
        self._check_columns()

    def _check_relative(self) -> None:
        if not self.relative:
            return
        units = {dimension.name: dimension.unit for dimension in self.state}
        for dimension in self.action:
            if dimension.kind == "joint":
                _check(
                    units.get(dimension.name) == dimension.unit,
                    f"robot {self.name}: action {dimension.name} is relative, but no state of that name has its unit {dimension.unit}: "
                    "name it as the state it moves, or say relative: false",
                )

    def _check_columns(self) -> None:
        cameras = [camera.name for camera in self.cameras]
        for name in self.columns.cameras:
            _check(name in cameras, f"robot {self.name}: columns.cameras: there is no camera {name}{suggest(name, cameras)}")
        for what in ("state", "action"):
            columns, dimensions = getattr(self.columns, what), getattr(self, what)
            _check(len(columns) > 0, f"robot {self.name}: columns.{what} names no column")
            given = sum(len(column.take) for column in columns)
            if all(column.take for column in columns):
                _check(
                    given == len(dimensions),
                    f"robot {self.name}: columns.{what} takes {given} values, but its {what} has {len(dimensions)} dimensions",
                )

    def camera_column(self, camera: str) -> str:
        """What a data set calls this camera."""
        return self.columns.cameras.get(camera, IMAGES + camera)


@dataclass(frozen=True)
class RobotFile:
    """A file of robots: robots.yaml beside this module, or the user's."""

    robots: tuple[Robot, ...]

    def __post_init__(self) -> None:
        _check_different("robot", (robot.name for robot in self.robots))


# --- the registry ----------------------------------------------------------------------------------------------------------


def load_robots(files: Iterable[Any] = ()) -> dict[str, Robot]:
    """Every robot by name: the package's, then those of the user's files, local or in a bucket, which can replace none."""
    robots: dict[str, Robot] = {}
    origin: dict[str, str] = {}
    for file in (OURS, *files):
        for robot in configfile.read(RobotFile, file).robots:
            if robot.name in robots:
                raise RequestError(f"{file}: robot {robot.name} is already defined in {origin[robot.name]}: give it another name")
            robots[robot.name] = robot
            origin[robot.name] = "the package" if file is OURS else str(file)
    return robots


def check_stored(stored: Mapping[str, Robot], files: Iterable[Any]) -> None:
    """Refuses a user's file that describes a robot otherwise than the one of that name which a policy was trained with."""
    load_robots(files)
    for file in files:
        for robot in configfile.read(RobotFile, file).robots:
            difference = _difference(asdict(robot), asdict(stored.get(robot.name, robot)))
            if difference:
                raise RequestError(f"{file}: robot {robot.name} is not the one that is stored with the policy: {difference}; rename it")


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """The first place where two trees differ, or nothing."""
    if found == wanted:
        return ""
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        parts = [(key, found[key], wanted[key]) for key in found]
    elif isinstance(found, tuple) and isinstance(wanted, tuple) and len(found) == len(wanted):
        parts = [(str(i), one, other) for i, (one, other) in enumerate(zip(found, wanted, strict=True))]
    else:
        said = [
            ", ".join(value) if isinstance(value, dict) else f"{len(value)} entries" if isinstance(value, tuple) else value
            for value in (found, wanted)
        ]
        return f"{path} is {said[0] or 'empty'}, there {said[1] or 'empty'}"
    return next(filter(None, (_difference(one, other, f"{path}.{key}" if path else key) for key, one, other in parts)))


def find_robot(name: str, robots: Mapping[str, Robot]) -> Robot:
    if name not in robots:
        raise RequestError(f"there is no robot {name!r}{suggest(name, robots) or '; there are ' + ', '.join(robots)}")
    return robots[name]


def render(robots: Mapping[str, Robot]) -> str:
    """The robots as YAML, every field written out. `load_robots` reads it."""
    return configfile.render(RobotFile(tuple(robots.values())))


def to_json(robots: Mapping[str, Robot]) -> list[dict[str, Any]]:
    """As lists, numbers and texts; the order is kept."""
    return [asdict(robot) for robot in robots.values()]


def from_json(value: Any, source: str) -> dict[str, Robot]:
    """What `to_json` gave, after it was written to `source` and read again."""
    return {robot.name: robot for robot in configfile.parse(RobotFile, {"robots": value}, source).robots}


# --- layout ----------------------------------------------------------------------------------------------------------------


def pad(values: np.ndarray, width: int) -> np.ndarray:
    """The values with zeros behind them, [..., dims] to [..., width]."""
    count = values.shape[-1]
    if count > width:
        raise RequestError(f"{count} values do not fit a width of {width}")
    padded = np.zeros((*values.shape[:-1], width), values.dtype)
    padded[..., :count] = values
    return padded


def state_mask(robot: Robot, width: int) -> np.ndarray:
    """Which of the padded dimensions the robot has, [width] bool."""
    return _mask(robot, "state", width)


def action_mask(robot: Robot, horizon: int, width: int) -> np.ndarray:
    """Which steps and padded dimensions of a chunk the robot has, [horizon, width] bool."""
    if robot.horizon > horizon:
        raise RequestError(
            f"robot {robot.name} has chunks of {robot.horizon} steps, the policy of {horizon}: lower its horizon or raise policy.horizon"
        )
    steps = np.arange(horizon) < robot.horizon
    return steps[:, None] & _mask(robot, "action", width)


def _mask(robot: Robot, what: Literal["state", "action"], width: int) -> np.ndarray:
    dims = len(getattr(robot, what))
    if dims > width:
        raise RequestError(
            f"robot {robot.name} has {dims} {what} dimensions, the policy room for {width}: raise policy.embodiment.{what}_width to {dims}"
        )
    return np.arange(width) < dims


def limits(dimensions: Sequence[Dimension]) -> tuple[np.ndarray, np.ndarray]:
    """Low and high [dims] float32, rounded inward, so that a number clipped to them never passes the true ones."""
    low = np.array([dimension.low for dimension in dimensions])
    high = np.array([dimension.high for dimension in dimensions])
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    return np.where(low32 < low, np.nextafter(low32, up), low32), np.where(high32 > high, np.nextafter(high32, down), high32)


def clip(actions: np.ndarray, robot: Robot) -> np.ndarray:
    """Absolute actions [..., dims] within the robot's limits, float32."""
    low, high = limits(robot.action)
    return np.clip(actions.astype(np.float32), low, high)


def take_columns(columns: Sequence[Column], values: Mapping[str, np.ndarray], dimensions: Sequence[Dimension]) -> np.ndarray:
    """States or actions [rows, dims] out of a data set's columns, each [rows, elements], or [rows] if it holds one number a row."""
    parts: list[np.ndarray] = []
    for column in columns:
        if column.name not in values:
            raise RequestError(f"the data set has no column {column.name}{suggest(column.name, values) or '; it has ' + ', '.join(values)}")
        theirs = np.asarray(values[column.name], np.float64)
        theirs = theirs.reshape(len(theirs), -1)
        if column.take:
            if max(column.take) >= theirs.shape[1]:
                raise RequestError(f"column {column.name} has {theirs.shape[1]} elements: there is no element {max(column.take)} to take")
            theirs = theirs[:, list(column.take)]
        parts.append(column.scale * theirs + column.offset)
    ours = np.concatenate(parts, axis=1)
    if ours.shape[1] != len(dimensions):
        names = ", ".join(column.name for column in columns)
        raise RequestError(f"{names}: {ours.shape[1]} values for {len(dimensions)} dimensions: say in columns which ones to take")
    return ours
