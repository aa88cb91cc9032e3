"""`blm eval openloop`: what a policy would do at steps of recorded episodes, beside what was done there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from blm_jax import mesh as meshes
from blm_jax.batch import Prompts
from blm_jax.config import HardwareConfig
from blm_jax.convert.output import Output
from blm_jax.convert.team import Team
from blm_jax.data import page
from blm_jax.data.demos.demonstrations import Demonstrations
from blm_jax.data.demos.episodes import BadEpisode, Source
from blm_jax.data.demos.moments import Augmentation, Prompter, instruction_at, observe
from blm_jax.data.demos.observation import Observation, check_output, check_state
from blm_jax.data.demos.robots import Robot, check_stored
from blm_jax.data.demos.sets import Episode, check_layout, chunks, open_set, read_episode, read_pictures
from blm_jax.data.files import open_path
from blm_jax.data.loader import Loader
from blm_jax.data.prompt import PromptEngine
from blm_jax.errors import RequestError, RunError
from blm_jax.evaluate.openloop_page import EPISODES, Shown, as_html, as_markdown, as_text
from blm_jax.evaluate.scores import Errors, Truth, errors, forecasts, plain, ranges_of
from blm_jax.infer.act import Actor, Intent, load_actor, look
from blm_jax.weights.engine import open_engine
from blm_jax.weights.policy import PolicyFiles, read_policy
from blm_jax.weights.trained import newest_of_run

FORMAT = 1
ROWS = 8  # of a batch, for each part into which the mesh cuts it
PACKAGES = ("blm-jax", "jax", "jaxlib", "flax", "numpy")
RESULT = "openloop.json"  # written last


@dataclass(frozen=True)
class Request:
    """What `blm eval openloop` is asked for."""

    model: str
    sets: tuple[str, ...]
    robot: str
    robots_files: tuple[str, ...] = ()
    episodes: tuple[int, ...] | None = None  # of each set
    count: int | None = None  # of each set, evenly spread; without it and without `episodes`, all
    every: int | None = None  # steps; None: as often as the robot asks for a chunk
    samples: int = 1
    seed: int = 0
    steps: int | None = None  # of denoising; None: as the policy's config says
    out: str | None = None
    backbone: str | None = None  # where what a training checkpoint left frozen lies now
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed is {self.seed}: it must lie between 0 and 2**32 - 1")
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise RequestError("name at least one set, and each once")


@dataclass(frozen=True)
class Recorded:
    """The episodes of one set that are looked at."""

    source: Source
    episodes: dict[int, Episode]
    bad: dict[int, str]  # why, by number: of those that were to be looked at

    def opened(self, robot: Robot) -> Demonstrations:
        counts = np.zeros(self.source.count, np.int64)
        for number, episode in self.episodes.items():
            counts[number] = len(episode.action)
        return Demonstrations(self.source, robot, counts)


class Moment(NamedTuple):
    """A step that is looked at."""

    which: int  # of the sets
    episode: int
    step: int


class Opened(NamedTuple):
    """A request, looked at: numbers are read, pictures and weights are not."""

    model: str  # of a run, its newest checkpoint
    files: PolicyFiles
    robot: Robot
    every: int
    recorded: list[Recorded]
    moments: list[Moment]
    truth: Truth
    replay: np.ndarray  # [moments, horizon, dims]


def openloop(request: Request) -> dict[str, Any]:
    """What `blm eval openloop --json` prints, and `text` for a terminal."""
    start = time.perf_counter()
    opened = _open(request)
    robot, truth, statistics = opened.robot, opened.truth, opened.files.statistics[opened.robot.name]
    engine, mesh = open_engine(opened.model), meshes.make_mesh(request.hardware.mesh)
    actor = load_actor(opened.model, mesh, request.hardware.compute, engine, backbone=request.backbone)
    loaded = time.perf_counter()
    made = predict(actor, opened, request.samples, request.seed, request.steps)
    acted = time.perf_counter()
    ways = forecasts(made, opened.replay, truth, robot, statistics)
    found = {name: errors(chunks, truth, ranges_of(statistics)) for name, chunks in ways.items()}
    result = {
        **_terms(request, opened),
        "robots": {robot.name: _numbers(opened, found)},
        "seconds": {"load": loaded - start, "act": acted - loaded},
        "hardware": _hardware(mesh, request.hardware),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    if request.out is not None:
        _write(request.out, result, as_html(result, robot, _shown(opened, made)))
        result["out"] = request.out
    return {**result, "text": as_text(result)}


# --- what was done -----------------------------------------------------------------------------------------------------------


def _open(request: Request) -> Opened:
    if request.out is not None:
        check_output(request.out)
    model = os.fspath(newest_of_run(open_path(request.model)))
    files = read_policy(model)
    check_stored(files.robots, request.robots_files)
    robot = files.find(request.robot)
    every = request.every or robot.executed
    recorded = [_read(path, robot, request, every) for path in request.sets]
    return Opened(model, files, robot, every, recorded, *_moments(recorded, robot, every))


def _read(path: str, robot: Robot, request: Request, every: int) -> Recorded:
    source = open_set(path)
    check_layout(source, robot)
    if source.count == 0:
        raise RequestError(f"{path} holds no episode")
    wrong = [number for number in request.episodes or () if number >= source.count]
    if wrong:
        raise RequestError(f"{path} has the episodes 0 to {source.count - 1}, and no {wrong[0]}")
    named = None if request.episodes is None else sorted(set(request.episodes))
    chosen = named or page.spread(source.count, request.count or source.count)
    found = Recorded(source, {}, {})
    for number in tqdm(chosen, unit=" episodes", desc="numbers", disable=None if jax.process_index() == 0 else True):
        try:
            found.episodes[number] = _read_good(source, robot, number, every, pictures=not found.episodes)
        except BadEpisode as error:
            if named is not None:
                raise RequestError(f"{path}: episode {number} is bad: {error}") from None
            found.bad[number] = str(error)
    if not found.episodes:
        number, why = next(iter(found.bad.items()))
        raise RequestError(f"{path}: no episode can be used; episode {number}: {why}")
    return found


def _read_good(source: Source, robot: Robot, number: int, every: int, *, pictures: bool) -> Episode:
    """Raises BadEpisode. `pictures` opens the first ones too: a set need not say their sizes."""
    episode = read_episode(source, robot, number)
    for camera in robot.cameras:
        source.check_frames(number, robot.camera_column(camera.name))
        if pictures:
            read_pictures(source, robot, number, camera.name, [0])
    for step in range(0, len(episode.action), every):
        try:
            check_state(episode.state[step], robot)
        except RequestError as error:
            raise BadEpisode(f"step {step}: {error}") from None
    return episode


def _moments(recorded: Sequence[Recorded], robot: Robot, every: int) -> tuple[list[Moment], Truth, np.ndarray]:
    """All that are looked at; what was done, read along the episodes; and the same as the chunks that training reads."""
    moments: list[Moment] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for which, one in enumerate(recorded):
        for number, episode in one.episodes.items():
            count = len(episode.action)
            steps = np.arange(0, count, every)
            places = steps[:, None] + np.arange(robot.horizon)  # [moments, horizon]
            moments += [Moment(which, number, step) for step in steps.tolist()]
            done = episode.action[np.minimum(places, count - 1)]
            parts.append((done, places < count, episode.state[steps], chunks(episode, robot.horizon)[0][steps]))
    *truth, replay = (np.concatenate(part) for part in zip(*parts, strict=True))
    return moments, Truth(*truth), replay


# --- what the policy would do ------------------------------------------------------------------------------------------------


def predict(actor: Actor, opened: Opened, samples: int, seed: int, steps: int | None) -> np.ndarray:
    """Chunks [moments, samples, horizon, dims] in the robot's units. A moment's noise is of its number, whatever the batch."""
    moments, states = opened.moments, opened.truth.states
    shards = meshes.batch_shards(actor.mesh)
    rows = min(ROWS, -(-len(moments) // shards)) * shards
    quiet = None if jax.process_index() == 0 else True
    made: list[np.ndarray] = []
    with (
        closing(Loader(MomentPrompts(opened, actor.engine, rows))) as loader,
        tqdm(total=len(moments), unit=" chunks", desc="openloop", disable=quiet) as bar,
    ):
        for first in range(0, len(moments), rows):
            prompts = meshes.put(next(loader), actor.mesh)
            with meshes.use(actor.mesh):
                seen = look(actor.backbone, prompts, actor.policy.config.intent_block)
            now = [Observation(state, {}, "") for state in states[first : first + rows]]
            names = (opened.robot.name,) * len(now)
            settings = {"samples": samples, "seed": seed, "first": first, "steps": steps}
            made += actor.sample_actions(now, names, intent=Intent(names, seen), **settings)
            bar.update(len(now))
    chunks = np.stack(made)
    if not np.isfinite(chunks).all():
        raise RunError("the policy gave actions that are not finite: its weights are not to be trusted")
    return chunks


class MomentPrompts:
    """Prompts of moments, so many a batch; the last batch ends with rows of nothing. All have one shape, so programs are compiled once."""

    def __init__(self, opened: Opened, engine: PromptEngine, rows: int):
        self.moments, self.rows = opened.moments, rows
        self.sets = [one.opened(opened.robot) for one in opened.recorded]
        texts = {instruction_at(opened.recorded[one.which].episodes[one.episode], one.step) for one in opened.moments}
        room = max(_length(text, engine) for text in texts)
        self.prompter = Prompter(lambda: engine, opened.files.config.instruction, [opened.robot], room)

    def host_rows(self, host: int, hosts: int) -> range:
        """All: every process gives its devices their own."""
        return range(self.rows)

    def read(self, step: int, row: int) -> Prompts:
        number = step * self.rows + row
        if number >= len(self.moments):
            return self.prompter(None, self.sets[0].robot)
        which, episode, place = self.moments[number]
        one = self.sets[which]
        seen = observe(one, episode, place, Augmentation(), 0)
        return self.prompter(seen, one.robot, f"{one.source.path}, episode {episode}, step {place}")


def _length(text: str, engine: PromptEngine) -> int:
    """Of a prompt of the text alone: more than it takes in any other."""
    return len(engine.encode([{"role": "user", "content": text}], add_generation_prompt=True).tokens)


# --- what is told ------------------------------------------------------------------------------------------------------------


def _terms(request: Request, opened: Opened) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "format": FORMAT,
        "model": opened.model,
        "backbone": opened.files.backbone,
        "statistics": opened.files.statistics[opened.robot.name].fingerprint,
        "seed": request.seed,
        "samples": request.samples,
        "denoising_steps": request.steps or opened.files.config.objective.steps,
        "every": opened.every,
    }


def _numbers(opened: Opened, found: Mapping[str, Errors]) -> dict[str, Any]:
    """Of one robot."""
    robot, ranges = opened.robot, ranges_of(opened.files.statistics[opened.robot.name])
    sizes = zip(robot.action, ranges, strict=True)
    return {
        "sets": [_of_set(one) for one in opened.recorded],
        "episodes": sum(len(one.episodes) for one in opened.recorded),
        "moments": len(opened.moments),
        "actions": int(opened.truth.mask.sum()),
        "horizon": robot.horizon,
        "executed": robot.executed,
        "hz": robot.hz,
        "dimensions": [{"name": dimension.name, "unit": dimension.unit, "range": plain(size)} for dimension, size in sizes],
        "errors": {name: one.as_json([dimension.name for dimension in robot.action]) for name, one in found.items()},
    }


def _of_set(one: Recorded) -> dict[str, Any]:
    return {
        "path": os.fspath(one.source.path),
        "identity": one.source.identity,
        "episodes": list(one.episodes),
        "bad": [{"episode": number, "reason": why} for number, why in one.bad.items()],
    }


def _hardware(mesh: Mesh, asked: HardwareConfig) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    return {
        "device": device.device_kind,
        "devices": int(mesh.devices.size),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "dtype": asked.compute.dtype,
    }


def _shown(opened: Opened, made: np.ndarray) -> list[Shown]:
    """Some episodes with their chunks, evenly spread."""
    own: dict[tuple[int, int], list[int]] = {}
    for i, moment in enumerate(opened.moments):
        own.setdefault((moment.which, moment.episode), []).append(i)
    shown, keys = [], list(own)
    for key in (keys[i] for i in page.spread(len(keys), EPISODES)):
        one, numbers = opened.recorded[key[0]], own[key]
        steps = [opened.moments[i].step for i in numbers]
        shown.append(Shown(os.fspath(one.source.path), key[1], one.episodes[key[1]], steps, made[numbers]))
    return shown


def _write(out: str, result: Mapping[str, Any], html: bytes) -> None:
    team = Team.of_all_processes()
    with Output(open_path(out), 0, team) as output:
        if team.leads:
            (output.directory / page.PAGE).write_bytes(html)
            (output.directory / "openloop.md").write_text(as_markdown(result))
            (output.directory / RESULT).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
