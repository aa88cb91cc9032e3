"""`blm eval world`: episodes of the embedded world, many at once, and the table of how they went."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from blm_jax import mesh as meshes
from blm_jax.config import HardwareConfig
from blm_jax.convert.team import Team
from blm_jax.data.files import open_path, read_json, write_whole
from blm_jax.errors import RequestError, RunError
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.runs import cells, rollout
from blm_jax.evaluate.world.runs.cells import Episodes
from blm_jax.evaluate.world.runs.film import Films, Take, take_of
from blm_jax.evaluate.world.runs.pilot import Pilot
from blm_jax.evaluate.world.runs.report import as_markdown, as_text, summary
from blm_jax.evaluate.world.scene import Setting
from blm_jax.evaluate.world.tasks import TASKS
from blm_jax.infer.act import load_actor
from blm_jax.weights.policy import read_policy
from blm_jax.weights.trained import newest_of_run, stamp

FORMAT = 2
SCRIPTED = ("expert", "random", "still")  # in place of a MODEL
MOVED = 0.02  # metres, from which on a body was chosen
ROWS, AT_ONCE = 64, 8  # episodes of a batch for each device, and of those that it works on at a time
ASKED, EPISODES, RESULT = "request.json", "episodes.jsonl", "world.json"  # the last is written last
PACKAGES = ("blm-jax", "jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True)
class Request:
    """What `blm eval world` is asked for."""

    model: str  # or one of SCRIPTED
    robots: tuple[str, ...] = ROBOTS
    tasks: tuple[str, ...] = TASKS
    episodes: int = 50  # of each cell
    seed: int = 0
    steps: int | None = None  # of denoising
    two: bool = False  # cubes lie where there would be one, and the instruction tells them apart
    blind: bool = False  # the policy sees black pictures
    shuffled: bool = False  # the policy is told of the other cube
    films: int = 0  # of each cell's first episodes
    out: str | None = None
    backbone: str | None = None
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed is {self.seed}: it must lie between 0 and 2**32 - 1")
        if self.model in SCRIPTED and (self.blind or self.shuffled or self.steps):
            raise RequestError(f"{self.model} neither sees, reads nor denoises: leave --blind, --shuffled and --steps to a MODEL")
        if self.shuffled:
            alone = [task for task in self.tasks if TASKS.index(task) not in (*tasks.MAY_BE_TWO, tasks.STACK)]
            if alone or not self.two:
                lack = "give --two as well" if not self.two else f"{', '.join(alone)} has none: leave it out of --tasks"
                raise RequestError(f"--shuffled names the other cube: {lack}")
        if self.films and self.out is None:
            raise RequestError("--films are written beside the table: give --out DIR as well")
        if self.films > self.episodes:
            raise RequestError(f"--films {self.films} is more than a cell has: it has --episodes {self.episodes}")


def world(request: Request) -> dict[str, Any]:
    """What `blm eval world --json` prints, and `text` for a terminal."""
    start = time.perf_counter()
    mesh = meshes.make_mesh(request.hardware.mesh)
    model = request.model if request.model in SCRIPTED else os.fspath(newest_of_run(open_path(request.model)))
    folder = _Folder(request, _identity(request, model))
    driver = _driver(request, model, mesh)
    loaded = time.perf_counter()
    batches = _Batches(request, driver, mesh)
    done = _run(batches, folder)
    ran = time.perf_counter()
    filmed = _film(batches, folder, done) if request.films else {}
    result = {
        **folder.identity,
        **summary(done, request.robots, request.tasks),
        **filmed,
        "seconds": {"load": loaded - start, "run": ran - loaded, "films": time.perf_counter() - ran},
        "hardware": {"devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}", "mesh": dict(mesh.shape)},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    folder.finish(result)
    return {**result, "text": as_text(result)}


def _identity(request: Request, model: str) -> dict[str, Any]:
    """What tells one's episodes from another's."""
    if model in SCRIPTED:
        return {"model": model}
    files = read_policy(model)
    told = {"denoising_steps": request.steps or files.config.objective.steps, "dtype": request.hardware.compute.dtype}
    return {"model": model, "files": stamp(open_path(model)), "backbone": files.backbone, **told}


def _driver(request: Request, model: str, mesh: Mesh) -> rollout.Driver:
    if model in SCRIPTED:
        return {"expert": rollout.Expert, "random": rollout.Random, "still": rollout.Still}[model]()
    actor = load_actor(model, mesh, request.hardware.compute, backbone=request.backbone)
    pilot = Pilot(actor, steps=request.steps, seed=request.seed, blind=request.blind)
    for name in request.robots:
        pilot.robot(name)
    return pilot


class _Played(NamedTuple):
    """A batch when its episodes are over, on its devices."""

    episodes: Episodes
    settings: Setting
    traces: list[rollout.Trace]  # one a turn
    at: rollout.Progress


class _Batches:
    """Always of as many rows: for fewer compilers round otherwise, and an episode would be another on a larger mesh."""

    def __init__(self, request: Request, driver: rollout.Driver, mesh: Mesh):
        self.request, self.driver, self.mesh = request, driver, mesh
        self.every = cells.episodes_of(request.robots, request.tasks, request.episodes)
        shards = meshes.batch_shards(mesh)
        self.rows = shards * AT_ONCE * max(1, min(ROWS // AT_ONCE, len(self.every.robot) // (shards * AT_ONCE)))
        self.turn = rollout.make_turn(driver, mesh, AT_ONCE)

    def play(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, _Played]]:
        """These of all episodes, batch after batch: which they are, and how they went. The last batch repeats its last episode."""
        for first in range(0, len(wanted), self.rows):
            places = wanted[first : first + self.rows]
            repeated = np.pad(places, (0, self.rows - len(places)), mode="edge")
            with meshes.use(self.mesh):
                played = self._play(self.every.part(repeated))
            yield places, played

    def _play(self, episodes: Episodes) -> _Played:
        request, driver, mesh, count = self.request, self.driver, self.mesh, self.rows
        own = meshes.rows_of_process(mesh, count)
        mine = episodes.part(own)
        settings, states = cells.begin(np.uint32(request.seed), *mine, kind=cells.EVALUATION, two=request.two)
        limits = np.array(tasks.LIMITS, np.int32)[mine.task]
        rows = _rows(request, driver, settings, mine)
        progress = rollout.started(driver, rows, settings, states)
        rows, settings, limits, progress = (rollout.put(part, mesh, own, count) for part in (rows, settings, limits, progress))
        traces = []
        for number in range(-(-int(max(tasks.LIMITS[task] for task in episodes.task)) // driver.turn)):
            progress, trace = self.turn(driver.values, rows, settings, limits, progress, np.int32(number))
            traces.append(trace)
        return _Played(episodes, settings, traces, progress)


def _run(batches: _Batches, folder: _Folder) -> list[dict[str, Any]]:
    count = len(batches.every.robot)
    done = list(folder.done)
    begun = int(multihost_utils.broadcast_one_to_all(np.int32(len(done))))  # the others need not see the directory
    with tqdm(total=count, initial=begun, unit=" episodes", desc="world", disable=None if folder.leads else True) as bar:
        for places, played in batches.play(np.arange(begun, count)):
            found = _told(played)[: len(places)]
            folder.add(found)
            done += found
            bar.update(len(places))
    return done


def _told(played: _Played) -> list[dict[str, Any]]:
    at, begun = played.at, played.traces[0].state.position[:, 0]
    parts = (at.held, at.first, at.state.position, begun, played.settings.wanted)
    held, first, ended, begun, wanted = (np.asarray(multihost_utils.process_allgather(part, tiled=True)) for part in parts)
    right = right_moved(begun, ended, wanted)
    return [
        {
            "robot": ROBOTS[robot],
            "task": TASKS[task],
            "episode": int(number),
            "success": bool(held_for >= rollout.HELD),
            "once": bool(once >= 0),
            "steps": int(once),
            "right": bool(is_right),
            "end": [float(value) for value in end[0]],  # where the first body was left
        }
        for robot, task, number, held_for, once, is_right, end in zip(*played.episodes, held, first, right, ended, strict=True)
    ]


def right_moved(begun: np.ndarray, ended: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether of all bodies, [episodes, bodies, 3] when it began and ended, the one that was meant was moved furthest, and was moved."""
    moved = np.linalg.norm(ended - begun, axis=-1)
    return (moved.argmax(axis=1) == wanted) & (moved.max(axis=1) >= MOVED)


def _film(batches: _Batches, folder: _Folder, done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Episodes that are not filmed yet are done once more: in batches of the same shape, so that they are the same, bit for bit."""
    assert folder.path is not None
    films, team = Films(folder.path), Team.of_all_processes()
    wanted = np.flatnonzero(batches.every.number < batches.request.films)
    lacks = films.missing(batches.every.part(wanted)) if folder.leads else np.zeros(len(wanted), bool)
    lacks = wanted[np.flatnonzero(multihost_utils.broadcast_one_to_all(lacks.astype(np.int32)))]

    def write(places: np.ndarray, found: Sequence[dict[str, Any]], take: Take) -> None:
        for place, one in zip(places.tolist(), found, strict=True):
            if done[place] != one:
                raise RunError(
                    f"episode {one['episode']} of {one['robot']}, {one['task']} went otherwise when it was filmed than {folder.path} says: "
                    "if that was begun on another machine, go on there, or remove it"
                )
        films.write(take, found)

    with tqdm(total=len(lacks), unit=" films", desc="films", disable=None if folder.leads else True) as bar:
        for places, played in batches.play(lacks):
            found, take = _told(played)[: len(places)], take_of(played.settings, played.traces, played.at)
            team.together(partial(write, places, found, take) if folder.leads else lambda: None)
            bar.update(len(places))
    team.together(films.finish if folder.leads else lambda: None)
    if not folder.leads:
        return {}
    names = ("robot", "task", "episode", "success")
    shown = [{name: done[place][name] for name in names} for place in wanted.tolist()]
    told = [{**one, "path": os.fspath(films.path(one["robot"], one["task"], one["episode"]))} for one in shown]
    return {"films": told, "sheet": os.fspath(films.sheet)}


def _rows(request: Request, driver: rollout.Driver, settings: Any, episodes: Episodes) -> Any:
    if not isinstance(driver, Pilot):
        return episodes.serial
    asked = settings._replace(wanted=1 - settings.wanted) if request.shuffled else settings
    texts = cells.instructions(asked, episodes.number)
    return driver.rows([ROBOTS[robot] for robot in episodes.robot], texts, episodes.serial)


# --- the directory -----------------------------------------------------------------------------------------------------------


class _Folder:
    """Where episodes are written as they are done, so that a run that was cut off goes on."""

    def __init__(self, request: Request, whose: dict[str, Any]):
        asked = asdict(request)
        for name in ("out", "backbone", "hardware", "model", "steps", "films"):  # these change no episode
            del asked[name]
        self.identity = json.loads(json.dumps({"format": FORMAT, **whose, **asked, "limits": dict(zip(TASKS, tasks.LIMITS, strict=True))}))
        self.path = None if request.out is None else open_path(request.out)
        self.done: list[dict[str, Any]] = []
        self.leads = jax.process_index() == 0
        if self.path is not None:
            Team.of_all_processes().together(self._open if self.leads else lambda: None)

    def _open(self) -> None:
        assert self.path is not None
        if "://" in os.fspath(self.path):
            raise RequestError(f"--out {self.path} lies in a bucket: episodes are written one after the other; name a local directory")
        if (self.path / ASKED).exists():
            if read_json(self.path / ASKED) != self.identity:
                raise RequestError(f"{self.path} holds episodes of another request: choose another --out, or remove it")
            lines = (self.path / EPISODES).read_text().split("\n") if (self.path / EPISODES).exists() else []
            try:
                self.done = [json.loads(line) for line in lines[:-1]]  # what follows the last line's end was cut off
            except ValueError as error:
                raise RequestError(f"{self.path / EPISODES} holds lines that are no JSON: choose another --out, or remove it") from error
        elif self.path.exists() and not self.path.is_dir():
            raise RequestError(f"--out {self.path} is a file: name a directory")
        elif self.path.exists() and any(self.path.iterdir()):
            raise RequestError(f"{self.path} exists and is no evaluation of the world: choose another --out, or remove it")
        else:
            write_whole(self.path / ASKED, json.dumps(self.identity, indent=1).encode() + b"\n")

    def add(self, found: list[dict[str, Any]]) -> None:
        if self.path is None or not self.leads:
            return
        text = "".join(json.dumps(one) + "\n" for one in found)
        with Path(self.path / EPISODES).open("r+b" if (self.path / EPISODES).exists() else "wb") as file:
            file.seek(sum(len(json.dumps(one)) + 1 for one in self.done))  # over a line that was cut off
            file.truncate()
            file.write(text.encode())
        self.done += found

    def finish(self, result: dict[str, Any]) -> None:
        if self.path is None or not self.leads:
            return
        write_whole(self.path / "world.md", as_markdown(result).encode())
        write_whole(self.path / RESULT, json.dumps(result, indent=1).encode() + b"\n")
