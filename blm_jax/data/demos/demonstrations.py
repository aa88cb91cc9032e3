"""Windows of robot demonstrations: what a policy sees at a step, and what was done from there on.

    robot = find_robot("my_arm", load_robots(["robots.yaml"]))
    survey = read_survey("my_arm.json", robot)                # what `blm data stats` wrote
    demonstrations = open_demonstrations("sets/pick", robot, survey)
    windows = [demonstrations.window(i) for i in (0, 17)]     # any of len(demonstrations), in any order
    robots, chunks = training_rows(windows, {robot.name: robot}, {robot.name: survey.statistics}, config)

Every step whose action was taken begins a window, or one in so many. Which window of a mixture comes when, `order.py` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from etils import epath

from blm_jax.batch import Chunks, RobotRows
from blm_jax.config import PolicyConfig
from blm_jax.configfile import suggest
from blm_jax.data.demos.episodes import BadEpisode, Source
from blm_jax.data.demos.observation import Observation
from blm_jax.data.demos.order import windows
from blm_jax.data.demos.robots import Robot, action_mask, pad, state_mask
from blm_jax.data.demos.sets import Episode, check_layout, open_set, read_episode, read_pictures
from blm_jax.data.demos.statistics import Statistics, encode_actions, encode_state
from blm_jax.data.demos.survey import Survey
from blm_jax.data.mixture import Corpus
from blm_jax.errors import RequestError, RunError

Found = TypeVar("Found")


@dataclass(frozen=True)
class Window:
    """One step of a demonstration and the chunk that begins there."""

    robot: str
    episode: int
    step: int
    observation: Observation  # the state is float32
    actions: np.ndarray  # [horizon, dims] float32, absolute; zeros where the mask is false
    mask: np.ndarray  # [horizon] bool: false past the episode's end
    future: dict[str, np.ndarray]  # pictures `horizon` steps later, by camera; zeros where there is none
    has_future: bool  # false past the episode's end


class Demonstrations:
    """The windows of one set, as one robot. Which episodes are good, the survey knows. It pickles."""

    def __init__(self, source: Source, robot: Robot, actions: np.ndarray, future: Sequence[str] = (), every: int = 1):
        """actions: how many each episode has, 0 for a bad one. future: cameras whose later pictures are wanted. every: steps from one
        window of an episode to the next."""
        if every < 1 or robot.horizon % every:
            raise RequestError(
                f"every is {every}: a window looks ahead {robot.horizon} steps, the horizon of {robot.name}, to where another begins; take "
                "what divides that"
            )
        cameras = [camera.name for camera in robot.cameras]
        for camera in future:
            if camera not in cameras:
                raise RequestError(
                    f"there is nothing to look ahead with: robot {robot.name} has no camera {camera}{suggest(camera, cameras)}"
                )
        self.source, self.robot, self.future, self.every = source, robot, tuple(future), every
        self._actions = np.asarray(actions)
        self._starts = np.concatenate([[0], np.cumsum(-(-self._actions // every))])  # [episodes + 1], the first window of each

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def actions(self) -> list[int]:
        """How many each episode has."""
        return self._actions.tolist()

    @property
    def episodes(self) -> int:
        return len(self._actions)

    def locate(self, index: int) -> tuple[int, int]:
        """The episode of a window, and the step."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no window {index}: {self.source.path} has {len(self)}")
        episode = int(np.searchsorted(self._starts, index, side="right")) - 1
        return episode, (index - int(self._starts[episode])) * self.every

    def in_mixture(self, name: str, share: Fraction = Fraction(1)) -> Corpus:
        """As a part of a `mixture.Mixture`."""
        return windows(name, len(self), share, os.fspath(self.source.path))

    def episode(self, number: int) -> Episode:
        return self._read(number, lambda: read_episode(self.source, self.robot, number))

    def window(self, index: int) -> Window:
        number, step = self.locate(index)
        return self._read(number, lambda: read_window(self.source, self.robot, number, step, self.future))

    def _read(self, number: int, read: Callable[[], Found]) -> Found:
        try:
            return read()
        except BadEpisode as error:
            raise RunError(f"{self.source.path}, episode {number}: {error}") from error


def read_window(source: Source, robot: Robot, number: int, step: int, future: Sequence[str] = ()) -> Window:
    """The window that begins at a step of an episode. Raises BadEpisode."""
    episode, horizon = read_episode(source, robot, number), robot.horizon
    count = min(horizon, len(episode.action) - step)
    actions = np.zeros((horizon, len(robot.action)), np.float32)
    actions[:count] = episode.action[step : step + count]
    has_future = step + horizon < len(episode.state)
    images, ahead = {}, {}
    for camera in robot.cameras:
        wanted = camera.name in future
        steps = [step, step + horizon] if wanted and has_future else [step]
        pictures = read_pictures(source, robot, number, camera.name, steps)
        images[camera.name] = pictures[0]
        if wanted:
            ahead[camera.name] = pictures[1] if has_future else np.zeros_like(pictures[0])
    observation = Observation(episode.state[step].astype(np.float32), images, episode.instructions[step])
    return Window(robot.name, number, step, observation, actions, np.arange(horizon) < count, ahead, has_future)


def open_demonstrations(path: epath.PathLike, robot: Robot, survey: Survey, future: Sequence[str] = (), every: int = 1) -> Demonstrations:
    """A set that was surveyed as this robot. `future` names cameras whose pictures `horizon` steps later are wanted too; windows begin
    `every` so many steps."""
    source = open_set(path)
    check_layout(source, robot)
    return Demonstrations(source, robot, np.array(survey.of(source).actions), future, every)


def training_rows(
    windows: Sequence[Window], robots: Mapping[str, Robot], statistics: Mapping[str, Statistics], config: PolicyConfig
) -> tuple[RobotRows, Chunks]:
    """What the policy learns from, a window a row: normalised, as wide as the policy."""
    widths = config.embodiment.state_width, config.embodiment.action_width
    rows = len(windows)
    robot_rows = RobotRows(
        np.zeros(rows, np.int32),
        np.zeros((rows, widths[0]), np.float32),
        np.zeros((rows, widths[0]), bool),
        np.zeros((rows, config.horizon, widths[1]), bool),
    )
    made = Chunks(np.zeros((rows, config.horizon, widths[1]), np.float32), np.zeros((rows, config.horizon, widths[1]), bool))
    for i, window in enumerate(windows):
        robot, numbers = robots[window.robot], statistics[window.robot]
        if robot.name not in config.robots:
            raise RequestError(f"the policy has no robot {robot.name}{suggest(robot.name, config.robots)}: add it to policy.robots")
        state = window.observation.state
        robot_rows.robot[i] = config.robots.index(robot.name)
        robot_rows.state[i] = pad(encode_state(state, numbers), widths[0])
        robot_rows.state_mask[i] = state_mask(robot, widths[0])
        robot_rows.action_mask[i] = action_mask(robot, config.horizon, widths[1])
        encoded = encode_actions(window.actions, state, numbers, robot)
        made.actions[i, : robot.horizon] = pad(np.where(window.mask[:, None], encoded, 0), widths[1])
        made.mask[i] = robot_rows.action_mask[i]
        made.mask[i, : robot.horizon] &= window.mask[:, None]
    return robot_rows, made
