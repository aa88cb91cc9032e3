"""How far chunks are from what was done, by step of the horizon and dimension, in the robot's units and as shares of its ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm_jax.data.demos.robots import Robot, clip
from blm_jax.data.demos.statistics import Statistics, affine, to_absolute


@dataclass(frozen=True)
class Truth:
    """What was done from each moment on."""

    actions: np.ndarray  # [moments, horizon, dims] float64, absolute
    mask: np.ndarray  # [moments, horizon] bool: false past an episode's end
    states: np.ndarray  # [moments, dims] float64, at the moments


@dataclass(frozen=True)
class Errors:
    """Of one way of acting. NaN is what nothing is known of: a step that no episode reaches, a range of 0."""

    mae: np.ndarray  # [dims], over all steps that count
    rmse: np.ndarray  # [dims]
    step_mae: np.ndarray  # [horizon, dims]
    step_rmse: np.ndarray  # [horizon, dims]
    ranges: np.ndarray  # [dims]

    @property
    def share(self) -> float:
        """Of the ranges: the mean over dimensions that move."""
        return float(_over_dimensions(self.mae, self.ranges))

    @property
    def step_share(self) -> np.ndarray:
        """The same for each step of the horizon, [horizon]."""
        return _over_dimensions(self.step_mae, self.ranges)

    def as_json(self, names: list[str]) -> dict[str, Any]:
        shares = [self.mae / self.ranges, self.rmse / self.ranges]
        columns = zip(names, *map(plain, (self.mae, self.rmse, *shares)), strict=True)
        keys = ("mae", "rmse", "mae_of_range", "rmse_of_range")
        return {
            "of_range": plain(self.share),
            "dimensions": {name: dict(zip(keys, values, strict=True)) for name, *values in columns},
            "horizon": {"of_range": plain(self.step_share), "mae": plain(self.step_mae), "rmse": plain(self.step_rmse)},
        }


def plain(values: Any) -> Any:
    """As JSON knows it: lists of numbers, and None for NaN."""
    if np.ndim(values):
        return [plain(value) for value in values]
    return None if np.isnan(values) else float(values)


def errors(chunks: np.ndarray, truth: Truth, ranges: np.ndarray) -> Errors:
    """Of chunks [moments, samples, horizon, dims], each of which counts alike."""
    off = _off(chunks, truth)
    counts = truth.mask.sum(axis=0)[:, None] * chunks.shape[1]  # [horizon, 1]
    absolute, squares = np.abs(off).sum(axis=(0, 1)), np.square(off).sum(axis=(0, 1))  # [horizon, dims]
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        by_step = absolute / counts, np.sqrt(squares / counts)
    total = counts.sum()
    return Errors(absolute.sum(axis=0) / total, np.sqrt(squares.sum(axis=0) / total), *by_step, ranges)


def _off(chunks: np.ndarray, truth: Truth) -> np.ndarray:
    """[moments, samples, horizon, dims] float64; 0 past an episode's end."""
    return np.where(truth.mask[:, None, :, None], chunks - truth.actions[:, None], 0.0)


def _over_dimensions(values: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Shares of the ranges, [..., dims] to [...]; NaN where no dimension moves."""
    moves = ~np.isnan(ranges)
    return (values[..., moves] / ranges[moves]).mean(axis=-1) if moves.any() else np.full(values.shape[:-1], np.nan)


def ranges_of(statistics: Statistics) -> np.ndarray:
    """The lengths of what normalisation brings to -1 to 1, [dims]; NaN of a dimension that never moves."""
    scale = affine(statistics.action, statistics.scheme)[1]
    return np.where(scale > 0, 2 * scale, np.nan)


# --- ways of acting ----------------------------------------------------------------------------------------------------------


def forecasts(made: np.ndarray, replay: np.ndarray, truth: Truth, robot: Robot, statistics: Statistics) -> Mapping[str, np.ndarray]:
    """Chunks [moments, samples, horizon, dims] of the policy and of what is simpler, by the names that tables give them."""
    ways = {"policy": made}
    samples = made.shape[1]
    if samples > 1:
        ways[f"mean of {samples}"] = made.mean(axis=1, dtype=np.float64, keepdims=True)
        ways[f"best of {samples}"] = best(made, truth, ranges_of(statistics))
    horizon = truth.mask.shape[1]
    still, mean = hold(truth.states, horizon, robot), mean_chunks(truth.states, robot, statistics)
    return ways | {"hold": still[:, None], "mean": mean[:, None], "replay": replay[:, None]}


def best(chunks: np.ndarray, truth: Truth, ranges: np.ndarray) -> np.ndarray:
    """Of each moment's samples the one that is nearest to what was done, by shares of the ranges: [moments, 1, horizon, dims]."""
    moves = ~np.isnan(ranges)
    off = np.abs(_off(chunks, truth))[..., moves] / ranges[moves]
    nearest = off.sum(axis=(2, 3)).argmin(axis=1)
    return np.take_along_axis(chunks, nearest[:, None, None, None], axis=1)


def hold(states: np.ndarray, horizon: int, robot: Robot) -> np.ndarray:
    """The robot stays where it is, [moments, horizon, dims]; NaN in dimensions whose place the state does not tell."""
    places = {(dimension.name, dimension.unit): i for i, dimension in enumerate(robot.state)}
    found = [places.get((dimension.name, dimension.unit)) for dimension in robot.action]
    now = np.stack([np.full(len(states), np.nan) if place is None else states[:, place] for place in found], axis=-1)
    return clip(np.repeat(now[:, None], horizon, axis=1), robot)


def mean_chunks(states: np.ndarray, robot: Robot, statistics: Statistics) -> np.ndarray:
    """The mean of all that was learned from, whatever is seen, [moments, horizon, dims]."""
    mean = np.broadcast_to(statistics.action.mean, (len(states), robot.horizon, len(robot.action)))
    return clip(to_absolute(mean, states, robot), robot)
