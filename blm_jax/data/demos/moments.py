"""Moments of demonstrations as Stage II reads them: what is seen as prompts for the frozen backbone, or as intents made before.

    moments = open_moments(sets, statistics, policy, functools.partial(open_engine, model), batch=64, shares=["80 %", 2])
    for batch in Loader(moments, start=step, workers=8): ...

Which moment is row r of step s, which version of it is shown, and all that is in it depend on these two numbers and the seed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from blm_jax.batch import IntentRows, Moments, Prompts
from blm_jax.config import Instruction, PolicyConfig
from blm_jax.configfile import suggest
from blm_jax.data.corpora.corpus import reading
from blm_jax.data.demos.demonstrations import Demonstrations, Window, training_rows
from blm_jax.data.demos.episodes import BadEpisode, Source
from blm_jax.data.demos.intents import FrameSet, Intents, Plan
from blm_jax.data.demos.observation import Observation, encode, prompts_of
from blm_jax.data.demos.order import WindowOrder
from blm_jax.data.demos.robots import Robot, action_mask, state_mask
from blm_jax.data.demos.sets import Episode, read_pictures
from blm_jax.data.demos.statistics import Statistics, check_statistics
from blm_jax.data.demos.survey import digest, fingerprint
from blm_jax.data.loader import host_rows
from blm_jax.data.mixture import Mixture, read_shares
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.augment import AugmentConfig, augment, generator
from blm_jax.data.vision.pixels import levels_of
from blm_jax.data.vision.windows import cut_frame, slots_needed
from blm_jax.errors import RequestError, RunError

ROOM = 64  # tokens of the longest instruction
ROUND = 32  # lengths are multiples of it


@dataclass(frozen=True)
class Augmentation:
    """How pictures are changed: those of an episode alike, so that the future a policy foresees is that of what it sees."""

    changes: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0
    versions: int = 0  # how many there are of an episode; 0 makes a new one each time

    def version(self, sight: int) -> int:
        """Which version is shown the `sight`-th time that anything is."""
        if not self.changes.changes:
            return 0
        return int(generator(self.seed, sight).integers(self.versions)) if self.versions else sight

    def change(self, pictures: Mapping[str, np.ndarray], source: Source, episode: int, version: int) -> dict[str, np.ndarray]:
        """Pictures of one step, by camera, in the order of the cameras."""
        whose = int.from_bytes(hashlib.sha256(source.identity.encode()).digest()[:8], "big")
        return {
            camera: augment([picture], self.changes, generator(self.seed, whose, episode, version, number))[0]
            for number, (camera, picture) in enumerate(pictures.items())
        }


# --- prompts of one shape ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of the prompts of all robots."""

    length: int  # tokens
    row_length: int  # patches of a vision row: each prompt has one


def shape_of(robots: Sequence[Robot], engine: PromptEngine, instruction: Instruction, room: int) -> Shape:
    """What pictures of the robots' sizes, the chat template and an instruction of `room` tokens need."""
    lengths, rows = [], []
    for robot in robots:
        example = encode(blank(robot), robot, engine, instruction)
        vision = engine.config.vision
        cuts = [cut_frame(picture.grid.rows, picture.grid.columns, vision) for picture in example.pictures]
        lengths.append(-(-(len(example.tokens) + room) // ROUND) * ROUND)
        rows.append(slots_needed(cuts, vision) * vision.window_patches)
    return Shape(max(lengths), max(rows))


def blank(robot: Robot, instruction: str = "Go") -> Observation:
    """Of nothing, for what depends on sizes and words alone."""
    images = {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in robot.cameras}
    return Observation(np.zeros(len(robot.state), np.float32), images, instruction)


class Prompter:
    """From observations of these robots to prompts of one shape, a row each. It pickles."""

    def __init__(self, open_engine: Callable[[], PromptEngine], instruction: Instruction, robots: Sequence[Robot], room: int = ROOM):
        self.open_engine, self.robots, self.room = open_engine, tuple(robots), room
        self.instruction: Instruction = instruction

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompter, (self.open_engine, self.instruction, self.robots, self.room)

    @cached_property
    def engine(self) -> PromptEngine:
        """A process's own: what reads words and templates does not travel."""
        return self.open_engine()

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.robots, self.engine, self.instruction, self.room)

    def __call__(self, observation: Observation | None, robot: Robot, where: str = "") -> Prompts:
        """One row; without an observation, a row of nothing. Pictures stay bytes."""
        example = None if observation is None else encode(observation, robot, self.engine, self.instruction)
        if example is not None and len(example.tokens) > self.shape.length:
            raise RequestError(
                f"{where}: the prompt has {len(example.tokens)} tokens, and {self.shape.length} is the length of all: "
                f"make room for instructions of {len(example.tokens) - self.shape.length} tokens more, or shorten this one"
            )
        engine, levels = self.engine, levels_of(self.engine.pixels)
        shape = {"vision_row_length": self.shape.row_length, "levels": levels}
        return prompts_of([example], engine.config, self.instruction, self.shape.length, **shape)


def observe(demonstrations: Demonstrations, episode: int, step: int, augmentation: Augmentation, version: int) -> Observation:
    """A step as a window sees it, now or a chunk later."""
    source, robot = demonstrations.source, demonstrations.robot
    numbers = demonstrations.episode(episode)
    try:
        pictures = {camera.name: read_pictures(source, robot, episode, camera.name, [step])[0] for camera in robot.cameras}
    except BadEpisode as error:
        raise RunError(f"{source.path}, episode {episode}: {error}") from error
    return Observation(numbers.state[step], augmentation.change(pictures, source, episode, version), instruction_at(numbers, step))


def instruction_at(episode: Episode, step: int) -> str:
    """The observation after the last action has that of the action: its own may be empty."""
    return episode.instructions[min(step, len(episode.action) - 1)]


# --- what is seen ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Online:
    """The backbone looks at pictures in each step of training."""

    demonstrations: Demonstrations  # that look ahead with all cameras
    prompter: Prompter
    augmentation: Augmentation

    def read(self, index: int, sight: int) -> tuple[Window, Prompts, Prompts]:
        window = self.demonstrations.window(index)
        robot, source, now = self.demonstrations.robot, self.demonstrations.source, window.observation
        version = self.augmentation.version(sight)
        where = f"{source.path}, episode {window.episode}, step {window.step}"

        def prompt(pictures: Mapping[str, np.ndarray], instruction: str) -> Prompts:
            changed = self.augmentation.change(pictures, source, window.episode, version)
            return self.prompter(Observation(now.state, changed, instruction), robot, where)

        seen = prompt(dict(now.images), now.instruction)
        if not window.has_future:
            return window, seen, self.prompter(None, robot)
        numbers = self.demonstrations.episode(window.episode)
        return window, seen, prompt(window.future, instruction_at(numbers, window.step + robot.horizon))


@dataclass(frozen=True)
class Cached:
    """The backbone has looked at all pictures before."""

    demonstrations: Demonstrations
    intents: Intents
    which: int  # of its sets
    augmentation: Augmentation
    tokens: int  # of a row

    def read(self, index: int, sight: int) -> tuple[Window, IntentRows, IntentRows]:
        robot = self.demonstrations.robot
        number, step = self.demonstrations.locate(index)
        state, action = self.intents.numbers(self.which, number)
        count, ahead = min(robot.horizon, len(action) - step), step + robot.horizon
        actions = np.zeros((robot.horizon, len(robot.action)), np.float32)
        actions[:count] = action[step : step + count]
        observation, has_future = Observation(np.array(state[step]), {}, ""), ahead < len(state)
        window = Window(robot.name, number, step, observation, actions, np.arange(robot.horizon) < count, {}, has_future)
        version = self.augmentation.version(sight)
        return window, self._row(number, step, version), self._row(number, ahead if has_future else None, version)

    def _row(self, episode: int, step: int | None, version: int) -> IntentRows:
        plan = self.intents.plan
        mask = np.zeros((1, self.tokens), bool)
        places = np.zeros((1, self.tokens, 4), np.int32)
        hidden = np.zeros((1, self.tokens, plan.width), plan.dtype)
        if step is not None:
            states, where = self.intents.frame(self.which, episode, step, version)
            hidden[0, : len(states)], mask[0, : len(states)], places[0, : len(states)] = states, True, where
        return IntentRows(hidden, mask, places)


View = Online | Cached


# --- rows --------------------------------------------------------------------------------------------------------------------


class MomentRows:
    """Rows of all steps' batches. `order` is of a mixture of the views' demonstrations, in this order."""

    def __init__(self, views: Sequence[View], order: WindowOrder, statistics: Mapping[str, Statistics], policy: PolicyConfig, batch: int):
        self.views, self.order, self.policy, self.batch = tuple(views), order, policy, batch
        self.tasks = tuple(range(len(self.views)))  # of each view, by which training tells losses apart
        self.statistics = dict(statistics)

    def host_rows(self, host: int, hosts: int) -> range:
        return host_rows(self.batch, host, hosts)

    def read(self, step: int, row: int) -> Moments:
        sight = step * self.batch + row
        which, index = self.order[sight]
        view = self.views[which]
        window, seen, future = view.read(index, sight)
        robots = {window.robot: view.demonstrations.robot}
        robot_rows, made = training_rows([window], robots, self.statistics, self.policy)
        return Moments(robot_rows, made, np.array([window.has_future]), seen, future, np.array([self.tasks[which]], np.int32))


def open_moments(
    sets: Sequence[Demonstrations],
    statistics: Mapping[str, Statistics],
    policy: PolicyConfig,
    open_engine: Callable[[], PromptEngine],
    *,
    batch: int,
    seed: int = 0,
    shares: Sequence[float | str] | None = None,
    augmentation: Augmentation | None = None,
    room: int = ROOM,
    intents: Sequence[Intents] = (),
    backbone: str = "",
    dtype: str = "float32",
) -> MomentRows:
    """Sets may be of several robots, `shares` weights or percentages, `statistics` by robot.

    With `intents`, one for each robot, no picture is opened; `backbone` is the fingerprint of the weights they must be of, and `dtype`
    what the backbone must have computed with.
    """
    augmentation = augmentation or Augmentation(seed=seed)
    for one in sets:
        _check_known(one, statistics, policy)
    if shares is None:
        shares = [1] * len(sets)
    if len(shares) != len(sets):
        raise RequestError(f"there are {len(sets)} sets of demonstrations and {len(shares)} shares: give each set one, in the same order")
    paths = [f"{one.source.path} as {one.robot.name}" for one in sets]
    if len(set(paths)) < len(paths):
        raise RequestError("a set of demonstrations is named twice for one robot: give it a larger share")
    parts = read_shares(dict(zip(paths, shares, strict=True)), dict(zip(paths, map(len, sets), strict=True)))
    # By what they hold: the order of a run does not depend on where its sets lie.
    names = [f"{one.robot.name} {one.source.identity}" for one in sets]
    mixture = Mixture([one.in_mixture(name, parts[path]) for name, path, one in zip(names, paths, sets, strict=True)])
    prompter = Prompter(open_engine, policy.instruction, [one.robot for one in sets], room)
    views: list[View] = []
    if intents:
        tokens = -(-max(one.longest for one in intents) // ROUND) * ROUND
        for one in sets:
            cache = _of_robot(one.robot, intents)
            cache.check(key_of(prompter.engine, policy, one.robot, backbone, augmentation, dtype), one.every)
            views.append(Cached(one, cache, cache.find(one.source.path, one.source.identity, one.actions), augmentation, tokens))
    else:
        for one in sets:
            if list(one.future) != [camera.name for camera in one.robot.cameras]:
                raise RequestError(f"{one.source.path}: open it with all cameras of {one.robot.name} to look ahead with")
            views.append(Online(one, prompter, augmentation))
    return MomentRows(views, WindowOrder(mixture, seed), statistics, policy, batch)


def _check_known(one: Demonstrations, statistics: Mapping[str, Statistics], policy: PolicyConfig) -> None:
    """What the first row would find lacking, said at the door."""
    robot, known = one.robot, ", ".join(statistics) or "none"
    if robot.name not in policy.robots:
        raise RequestError(f"the policy has no robot {robot.name}{suggest(robot.name, policy.robots)}: add it to policy.robots")
    if robot.name not in statistics:
        raise RequestError(f"{one.source.path}: of robot {robot.name} there are no statistics, only of {known}: read its survey too")
    check_statistics(statistics[robot.name], robot)
    state_mask(robot, policy.embodiment.state_width)
    action_mask(robot, policy.horizon, policy.embodiment.action_width)


def _of_robot(robot: Robot, intents: Sequence[Intents]) -> Intents:
    found = [one for one in intents if one.plan.robot == robot.name]
    if len(found) != 1:
        raise RequestError(f"there are {len(found) or 'no'} intents of {robot.name}: make them with blm data features, and name them once")
    return found[0]


def key_of(
    engine: PromptEngine, policy: PolicyConfig, robot: Robot, backbone: str, augmentation: Augmentation, dtype: str
) -> dict[str, str]:
    """All that intents depend on, but for the demonstrations, by the names that a refusal gives them."""
    changes = augmentation.changes
    told = [f"{name} {value:g}" for name, value in asdict(changes).items() if value]
    return {
        "backbone": backbone,
        "backbone config": digest(asdict(engine.config)),  # the same weights mean something else with another
        "dtype": dtype,
        "processor": digest(reading(engine)),
        "place of the instruction": policy.instruction,
        "robot entry": fingerprint(robot),
        "block": str(policy.intent_block),
        "augmentation": ", ".join([*told, f"seed {augmentation.seed}"]) if told else "none",
        "number of versions": str(augmentation.versions if changes.changes else 1),
    }


# --- every frame once, for what makes intents ----------------------------------------------------------------------------------


def used_frames(sets: Sequence[Demonstrations], *, show: bool = False) -> tuple[tuple[FrameSet, ...], np.ndarray, np.ndarray]:
    """The frames that windows use, and the numbers beside them: states and actions [steps, dims]. No picture is opened."""
    made = []
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    with tqdm(total=sum(map(len, sets)), unit=" steps", desc="numbers", disable=None if show else True) as bar:
        for one in sets:
            frames = []
            for number, count in enumerate(one.actions):
                if not count:
                    frames.append(0)
                    continue
                episode = one.episode(number)
                # A window looks ahead to the observation after the last action, if the episode has it and is long enough.
                ahead = int(count >= one.robot.horizon and count < len(episode.state))
                frames.append(count + ahead)
                states.append(episode.state[: count + ahead])
                actions.append(np.pad(episode.action, ((0, ahead), (0, 0))))
                bar.update(count)
            made.append(FrameSet(os.fspath(one.source.path), one.source.identity, tuple(frames), tuple(one.actions)))
    return tuple(made), np.concatenate(states), np.concatenate(actions)


class FrameRows:
    """Prompts of the frames of some shards, one shard after the other, so many rows a step; a shard ends with rows of nothing."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[int],
        sets: Sequence[Demonstrations],
        prompter: Prompter,
        augmentation: Augmentation,
        rows: int,
    ):
        self.plan, self.shards, self.sets = plan, tuple(shards), tuple(sets)
        self.prompter, self.augmentation, self.rows = prompter, augmentation, rows

    def host_rows(self, host: int, hosts: int) -> range:
        """All: each process has shards of its own."""
        return range(self.rows)

    @property
    def steps(self) -> int:
        return sum(-(-len(self.plan.shard(number)) // self.rows) for number in self.shards)

    def frame(self, step: int, row: int) -> int | None:
        which, place = divmod(step, -(-self.plan.per_shard // self.rows))  # only the last of all shards is shorter than others
        if which >= len(self.shards):
            return None  # a loader reads ahead
        own, number = self.plan.shard(self.shards[which]), place * self.rows + row
        return own[number] if number < len(own) else None

    def read(self, step: int, row: int) -> Prompts:
        frame = self.frame(step, row)
        if frame is None:
            return self.prompter(None, self.sets[0].robot)
        version, which, episode, place = self.plan.locate(frame)
        one = self.sets[which]
        seen = observe(one, episode, place, self.augmentation, version)
        return self.prompter(seen, one.robot, f"{one.source.path}, episode {episode}, step {place}")
