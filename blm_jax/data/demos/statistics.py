"""How a robot's numbers are distributed, and the way from them to what the model reads and back.

The model reads (value - center) / scale. Statistics are of what is trained: of actions relative to the state at the chunk's
start, where the robot is so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np

from blm_jax import configfile
from blm_jax.data.demos.robots import Dimension, Robot, clip
from blm_jax.errors import RequestError

Scheme = Literal["quantile", "mean_std", "min_max"]
# A spread below this is the rounding of one constant: radians, metres and openings are of the order of 1.
CONSTANT = 1e-6
# Quantiles that hold less than this share of the range miss what matters: a gripper that opens in one of a hundred steps.
NARROW = 1e-3


@dataclass(frozen=True)
class Summary:
    """Of each dimension of a state or an action, in order."""

    names: tuple[str, ...]
    count: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]  # 1 % of the values lie below
    q99: tuple[float, ...]  # 1 % of the values lie above

    def __post_init__(self) -> None:
        numbers = {name: values for name, values in vars(self).items() if name != "names"}
        for name, values in numbers.items():
            if len(values) != len(self.names):
                raise RequestError(f"{name} has {len(values)} values for {len(self.names)} dimensions")
            if not np.isfinite(values).all():
                raise RequestError(f"{name} holds values that are not finite")


@dataclass(frozen=True)
class Statistics:
    """Of one robot."""

    robot: str
    relative: bool
    horizon: int
    scheme: Scheme
    state: Summary
    action: Summary

    @cached_property
    def fingerprint(self) -> str:
        text = json.dumps(_content(self), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def from_arrays(
    robot: Robot, states: np.ndarray, actions: np.ndarray, mask: np.ndarray | None = None, scheme: Scheme = "quantile"
) -> Statistics:
    """Of states [n, dims] and the absolute chunks [n, horizon, dims] that begin there; `mask` [n, horizon] marks the steps that count."""
    valid = np.ones(actions.shape[:2], bool) if mask is None else mask
    state, action = len(robot.state), len(robot.action)
    shapes = (states.shape[1:], actions.shape, valid.shape)
    if shapes != ((state,), (len(states), robot.horizon, action), (len(states), robot.horizon)):
        raise RequestError(
            f"robot {robot.name} has states [n, {state}] and actions [n, {robot.horizon}, {action}], "
            f"not {list(states.shape)} and {list(actions.shape)} with a mask {list(valid.shape)}"
        )
    trained = to_relative(actions, states, robot)[valid]
    state_summary, action_summary = _summary(states, robot.state), _summary(trained, robot.action)
    return Statistics(robot.name, robot.relative, robot.horizon, scheme, state_summary, action_summary)


def _summary(values: np.ndarray, dimensions: Sequence[Dimension]) -> Summary:
    """Of [n, dims]."""
    if len(values) == 0:
        raise RequestError("there are no values to make statistics of")
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        wrong = [dimension.name for i, dimension in enumerate(dimensions) if not np.isfinite(values[:, i]).all()]
        raise RequestError(f"{', '.join(wrong)}: values that are not finite have no statistics")
    numbers = {
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "q01": np.quantile(values, 0.01, axis=0),
        "q99": np.quantile(values, 0.99, axis=0),
    }
    counts = (len(values),) * len(dimensions)
    return Summary(_names(dimensions), counts, **{name: tuple(found.tolist()) for name, found in numbers.items()})


# --- normalisation -----------------------------------------------------------------------------------------------------------


@cache  # it is asked for with each row that is read
def affine(summary: Summary, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Center and scale [dims] float64. A scale of 0 marks a dimension without spread: it is its center, always."""
    center, scale = _span(summary.min, summary.max)
    flat = scale <= CONSTANT * np.maximum(1, np.abs(center))
    if scheme == "quantile":
        inner_center, inner_scale = _span(summary.q01, summary.q99)
        wide = inner_scale > NARROW * scale
        center, scale = np.where(wide & ~flat, inner_center, center), np.where(wide, inner_scale, scale)
    elif scheme == "mean_std":
        center, scale = np.where(flat, center, summary.mean), np.array(summary.std)
    scale = np.where(flat, 0.0, scale)
    for array in (center, scale):
        array.setflags(write=False)
    return center, scale


def _span(low: Sequence[float], high: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half of the length."""
    return (np.array(low) + np.array(high)) / 2, (np.array(high) - np.array(low)) / 2


def normalise(values: np.ndarray, summary: Summary, scheme: Scheme) -> np.ndarray:
    """[..., dims] float32. Values beyond the quantiles lie beyond -1 and 1; a dimension without spread is 0."""
    center, scale = affine(summary, scheme)
    spread = scale > 0
    return np.where(spread, (values - center) / np.where(spread, scale, 1), 0).astype(np.float32)


def unnormalise(values: np.ndarray, summary: Summary, scheme: Scheme) -> np.ndarray:
    """[..., dims] float64: the inverse of `normalise`. A dimension without spread is its constant, whatever is given for it."""
    center, scale = affine(summary, scheme)
    return np.asarray(values, np.float64) * scale + center


# --- relative actions ----------------------------------------------------------------------------------------------------------


def to_relative(actions: np.ndarray, state: np.ndarray, robot: Robot) -> np.ndarray:
    """Chunks [..., horizon, dims] as the model speaks of them, from absolute ones and the state [..., dims] at their start."""
    return np.asarray(actions, np.float64) - _start(state, robot)


def to_absolute(actions: np.ndarray, state: np.ndarray, robot: Robot) -> np.ndarray:
    """The inverse of `to_relative`."""
    return np.asarray(actions, np.float64) + _start(state, robot)


def _start(state: np.ndarray, robot: Robot) -> np.ndarray:
    """What a chunk is relative to, [..., 1, action dims]: the joints of the state, and 0 where an action is absolute."""
    places = {dimension.name: i for i, dimension in enumerate(robot.state)}
    start = np.zeros((*np.shape(state)[:-1], 1, len(robot.action)))
    for i, dimension in enumerate(robot.action):
        if robot.relative and dimension.kind == "joint":
            start[..., 0, i] = state[..., places[dimension.name]]
    return start


# --- the whole way ---------------------------------------------------------------------------------------------------------------


def encode_state(state: np.ndarray, statistics: Statistics) -> np.ndarray:
    """What the model reads of states [..., dims]: float32."""
    return normalise(state, statistics.state, statistics.scheme)


def encode_actions(actions: np.ndarray, state: np.ndarray, statistics: Statistics, robot: Robot) -> np.ndarray:
    """What the model learns of absolute chunks [..., horizon, dims] that begin at the states [..., dims]: float32."""
    return normalise(to_relative(actions, state, robot), statistics.action, statistics.scheme)


def decode_actions(actions: np.ndarray, state: np.ndarray, statistics: Statistics, robot: Robot) -> np.ndarray:
    """Absolute chunks within the robot's limits, float32, of what the model says [..., horizon, dims] at the states [..., dims]."""
    return clip(to_absolute(unnormalise(actions, statistics.action, statistics.scheme), state, robot), robot)


# --- in files --------------------------------------------------------------------------------------------------------------------


def to_json(statistics: Statistics) -> dict[str, Any]:
    return {**_content(statistics), "fingerprint": statistics.fingerprint}


def _content(statistics: Statistics) -> dict[str, Any]:
    """The one form of equal statistics: a 0 and a 0.0 read alike."""
    content = asdict(statistics)
    for part in ("state", "action"):
        for name, values in content[part].items():
            content[part][name] = list(values) if name in ("names", "count") else [float(value) for value in values]
    return content


def from_json(value: Any, source: str) -> Statistics:
    """What `to_json` gave, after it was written to `source` and read again."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{source}: statistics are keys and values, not {type(value).__name__}")
    statistics = configfile.parse(Statistics, {key: content for key, content in value.items() if key != "fingerprint"}, source)
    if value.get("fingerprint") != statistics.fingerprint:
        raise RequestError(
            f"{source}: the statistics of {statistics.robot} do not have the fingerprint written there: they were edited; compute them anew"
        )
    return statistics


def check_statistics(statistics: Statistics, robot: Robot) -> None:
    """Refuses statistics of another robot, or of another layout of this one."""
    pairs = {
        "name": (statistics.robot, robot.name),
        "relative": (statistics.relative, robot.relative),
        "horizon": (statistics.horizon, robot.horizon),
        "state": (statistics.state.names, _names(robot.state)),
        "action": (statistics.action.names, _names(robot.action)),
    }
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            difference = _difference(what, found, wanted)
            raise RequestError(f"the statistics do not match robot {robot.name}: {difference}; compute them anew")


def _difference(what: str, found: Any, wanted: Any) -> str:
    if not isinstance(wanted, tuple):
        return f"their {what} is {found}, its {what} is {wanted}"
    if len(found) != len(wanted):
        return f"their {what} has {len(found)} dimensions, its {what} has {len(wanted)}"
    i = next(i for i in range(len(found)) if found[i] != wanted[i])
    return f"dimension {i} of their {what} is {found[i]}, of its {what} {wanted[i]}"


def _names(dimensions: Sequence[Dimension]) -> tuple[str, ...]:
    return tuple(dimension.name for dimension in dimensions)
