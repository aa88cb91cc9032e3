"""Demonstrations of two robots, a policy's config for both, and intents that are made of numbers alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blm_jax.config import BridgeConfig, DiTConfig, EmbodimentConfig, ObjectiveConfig, PolicyConfig
from blm_jax.data.demos import intents as store
from blm_jax.data.demos import robots
from blm_jax.data.demos.demonstrations import Demonstrations, open_demonstrations
from blm_jax.data.demos.intents import Form, Intents, Plan, open_intents
from blm_jax.data.demos.moments import Augmentation, FrameRows, MomentRows, Prompter, key_of, open_moments, used_frames
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.statistics import Statistics
from blm_jax.data.demos.survey import Survey, survey
from tests.data.corpora.material import open_engine
from tests.data.demos import recordings
from tests.data.demos.recordings import write

POLICY = PolicyConfig(
    robots=("small", "panda", "my_arm"),
    intent_block=1,
    intent_width=64,
    horizon=6,
    bridge=BridgeConfig(queries=3, blocks=1, width=32, heads=2, ffn=48, cameras=2),
    dit=DiTConfig(layers=2, heads=2, head_dim=16, ffn=48, tap=2, dropout=0.1, time_features=16),
    embodiment=EmbodimentConfig(state_width=9, action_width=8, hidden=24),
    objective=ObjectiveConfig(steps=2),
)
# As they are read from a user's file: limits are floats.
ROBOTS = robots.from_json(robots.to_json({robot.name: robot for robot in (recordings.SMALL, recordings.ARM)}), "recordings")
SMALL, ARM = ROBOTS.values()
# Some episodes are shorter than a chunk; RLDS has an observation after the last action, LeRobot has none.
LENGTHS = {"small": [5, 2, 9], "my_arm": [6, 3]}
BACKBONE = "sha256:" + "1" * 64


@dataclass(frozen=True)
class Stage:
    """Sets on disk, surveyed."""

    folder: Path
    model: str  # its tokenizer's files
    surveys: dict[str, Survey]

    @property
    def statistics(self) -> dict[str, Statistics]:
        return {name: found.statistics for name, found in self.surveys.items()}

    def open(self, name: str, *, ahead: bool = True) -> Demonstrations:
        robot = ROBOTS[name]
        cameras = tuple(camera.name for camera in robot.cameras) if ahead else ()
        return open_demonstrations(self.folder / name, robot, self.surveys[name], cameras)

    def sets(self, *, ahead: bool = True) -> list[Demonstrations]:
        return [self.open(name, ahead=ahead) for name in ROBOTS]

    def engine(self) -> functools.partial[Any]:
        return functools.partial(open_engine, self.model)

    def moments(self, *, batch: int = 4, intents: Sequence[Intents] = (), **settings: Any) -> MomentRows:
        settings = {"room": 8, "shares": [1, "150 %"], "backbone": BACKBONE, **settings}
        sets = self.sets(ahead=not intents)
        return open_moments(sets, self.statistics, POLICY, self.engine(), batch=batch, intents=intents, **settings)


def make_stage(folder: Path, model: Path) -> Stage:
    write(folder / "small", SMALL, LENGTHS["small"], "rlds")
    write(folder / "my_arm", ARM, LENGTHS["my_arm"], "lerobot")
    return Stage(folder, str(model), {name: survey([folder / name], robot) for name, robot in ROBOTS.items()})


def hidden_of(number: int, tokens: int) -> np.ndarray:
    """What a backbone that only counts frames makes of the `number`-th: bfloat16 holds it."""
    return np.random.default_rng(number).integers(-200, 200, (tokens, POLICY.intent_width)).astype(np.float32) / 64


def write_intents(
    path: Path | str, stage: Stage, robot: Robot, augmentation: Augmentation, form: Form = "float32", per_shard: int = 6
) -> Intents:
    """A whole store of a set, written frame by frame."""
    one = stage.open(robot.name, ahead=False)
    sets, state, action = used_frames([one])
    engine = stage.engine()
    key = key_of(engine(), POLICY, robot, BACKBONE, augmentation, "float32")
    plan = Plan(robot.name, key, form, POLICY.intent_width, max(augmentation.versions, 1), per_shard, sets)
    prompter = Prompter(engine, POLICY.instruction, [robot], 8)
    directory = store.open_path(path)
    store.begin(directory, plan)
    for number in range(plan.shards):
        rows = FrameRows(plan, [number], [one], prompter, augmentation, 1)
        prompts = [rows.read(step, 0) for step in range(rows.steps)]
        shown = [(prompt.mask[0], prompt.places[0]) for prompt in prompts]
        frames = zip(plan.shard(number), shown, strict=True)
        store.write_shard(directory, plan, number, ((hidden_of(frame, own.sum()), places[own]) for frame, (own, places) in frames))
    store.finish(directory, plan, state, action)
    return open_intents(path)
