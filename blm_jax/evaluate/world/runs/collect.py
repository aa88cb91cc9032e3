"""`blm data collect world`: demonstrations of the embedded world's experts, as sets of episodes that training reads.

Only what succeeded is kept, up to half a second after it had; what failed is tried again with other beginnings. Three of four recordings
begin in the midst of an episode, right after a jolt: from where no expert goes, they show the way on, and cost no pictures of what came
before. Pictures are most of the time that it takes, and those of one episode show the same places: cameras that look once in
so many steps (`every`) leave time for more episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig
from blm_jax.convert.output import Output
from blm_jax.convert.team import Team
from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.recorder import Form, Recorder
from blm_jax.data.demos.robots import Robot, load_robots
from blm_jax.data.files import open_path, write_whole
from blm_jax.errors import RequestError, RunError
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.runs import cells, rollout
from blm_jax.evaluate.world.runs.cells import MOST, PREFIX, Episodes
from blm_jax.evaluate.world.runs.frames import drawn
from blm_jax.evaluate.world.scene import JOINTS, Setting, State
from blm_jax.evaluate.world.tasks import TASKS

ROWS, AT_ONCE = 64, 8  # episodes of a batch, and of those that are worked on at a time
EPISODE_BYTES = 500_000  # about as large as one becomes on disk
MOST_NOISE = 0.2  # radians; with more no expert finds back
WHOLE = 4  # one of so many recordings begins with its episode
LATEST = 30  # step at which a recording begins
ROOM = 32  # steps that an episode may take longer than in evaluation: it was thrown back
FEWEST = 4  # steps that are worth a recording
TRIES = 3  # times as many attempts as episodes are asked for, at most


@dataclass(frozen=True)
class Request:
    """What `blm data collect world` is asked for."""

    out: str
    robots: tuple[str, ...] = ROBOTS
    tasks: tuple[str, ...] = TASKS
    episodes: tuple[int, ...] = (50,)  # of each cell, or of those of each task
    seed: int = 0
    noise: float = 0.005  # radians of each joint, of what is executed and not recorded
    every: int = 1  # steps from one look of the cameras to the next
    two: float = 0.0  # share of the episodes with another cube beside the one that is meant
    form: Form = "rlds"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed is {self.seed}: it must lie between 0 and 2**32 - 1")
        if len(self.episodes) not in (1, len(self.tasks)):
            counts = ",".join(map(str, self.episodes))
            raise RequestError(f"episodes are {counts}: give one number, or one for each of {', '.join(self.tasks)}")
        if not 0 <= self.noise <= MOST_NOISE:
            raise RequestError(f"noise is {self.noise}: it must lie between 0 and {MOST_NOISE} radians")
        if self.every < 1:
            raise RequestError(f"every is {self.every}: cameras look at each step (1), or at one in so many")
        if not 0 <= self.two <= 1:
            raise RequestError(f"two is {self.two}: it must lie between 0 and 1")

    @property
    def by_task(self) -> dict[str, int]:
        """How many episodes of each robot."""
        return dict(zip(self.tasks, self.episodes * (len(self.tasks) // len(self.episodes)), strict=True))


class Attempt(NamedTuple):
    """An episode as it was done."""

    setting: Setting
    states: State  # [steps + 1, ...]
    actions: np.ndarray  # [steps, JOINTS + 1]
    instruction: str


def collect(request: Request) -> dict[str, Any]:
    if "://" in request.out:
        raise RequestError(f"{request.out} lies in a bucket: collect to a disk, and copy the sets when they are whole")
    if jax.process_count() > 1:
        raise RequestError("demonstrations are collected by one process: leave out --processes")
    robots = load_robots()
    told: dict[str, Any] = {**asdict(request), "sets": {}, "yield": []}
    size = EPISODE_BYTES * sum(request.by_task.values()) * len(request.robots)
    with Output(open_path(request.out), size, Team()) as output:
        runner = _Runner(request)
        for name in request.robots:
            robot = robots[PREFIX + name]
            with Recorder(output.directory / robot.name, robot, request.form) as recorder:
                for task in request.tasks:
                    told["yield"].append(_collect_cell(request, runner, robot, name, task, recorder))
            told["sets"][robot.name] = f"{request.out}/{robot.name}"
        write_whole(output.directory / "collected.json", json.dumps(told, indent=1).encode() + b"\n")
    return told


def _collect_cell(request: Request, runner: _Runner, robot: Robot, name: str, task: str, recorder: Recorder) -> dict[str, Any]:
    kept = attempts = steps = 0
    wanted = request.by_task[task]
    with tqdm(total=wanted, unit=" episodes", desc=f"{name} {task}", disable=None) as bar:
        while kept < wanted:
            if attempts >= TRIES * wanted + ROWS:
                raise RunError(f"{name}, {task}: {kept} of {attempts} attempts succeeded, too few for {wanted} episodes")
            tried = list(runner.attempts(name, task, attempts))
            good = [(number, attempt) for number, attempt in enumerate(tried, 1) if attempt is not None][: wanted - kept]
            kept += len(good)
            attempts += len(tried) if kept < wanted else good[-1][0]
            for recording in recordings_of([attempt for _, attempt in good], robot, request.every) if good else ():
                recorder.add(recording)
                steps += len(recording.action)
                bar.update(1)
    return {"robot": name, "task": task, "episodes": kept, "attempts": attempts, "mean_steps": steps / kept}


class _Runner:
    """Attempts by the batch, in one compiled program for all cells."""

    def __init__(self, request: Request):
        self.request, self.driver = request, rollout.Jolted(request.noise)
        self.mesh = meshes.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        self.turn = rollout.make_turn(self.driver, self.mesh, AT_ONCE)
        self.rows = min(ROWS, -(-max(request.episodes) // AT_ONCE) * AT_ONCE)

    def attempts(self, name: str, task: str, first: int) -> Iterator[Attempt | None]:
        """Of numbers from `first` on; None if one has failed."""
        episodes = cells.episodes_of((name,), (task,), self.rows, first)
        seed, limit = self.request.seed, tasks.LIMITS[TASKS.index(task)] + ROOM
        settings, states = cells.begin(
            np.uint32(seed), *episodes, kind=cells.DEMONSTRATION, two=have_two(episodes.number, self.request.two)
        )
        settings = jax.device_get(settings)
        texts = cells.instructions(settings, episodes.number)
        begins = _begins(seed, episodes)
        rows = _seeds(seed, episodes), begins
        progress = rollout.started(self.driver, rows, settings, states)
        traces = self._run(settings, progress, rows, np.full(self.rows, limit, np.int32))
        for row in range(self.rows):
            ends = np.flatnonzero(traces.held[row] == rollout.HELD)
            begin, end = int(begins[row]), int(ends[-1]) + 1 if len(ends) else 0  # the last time that it succeeded, it stayed so
            if traces.held[row, -1] < rollout.HELD or end < begin + FEWEST:
                yield None
                continue
            pick = jax.tree.map(lambda x, row=row, kept=slice(begin, end + 1): x[row, kept], traces.state)
            yield Attempt(jax.tree.map(lambda x, row=row: x[row], settings), pick, np.asarray(traces.action[row, begin:end]), texts[row])

    def _run(self, settings: Setting, progress: Any, rows: Any, limits: np.ndarray) -> rollout.Trace:
        """[rows, steps, ...], until all have succeeded for good measure or the limit is reached."""
        own = list(range(self.rows))
        parts: list[rollout.Trace] = []
        with meshes.use(self.mesh):
            rows, settings, limits, at = (rollout.put(part, self.mesh, own, self.rows) for part in (rows, settings, limits, progress))
            for number in range(-(-int(np.max(limits)) // self.driver.turn)):
                at, trace = self.turn(self.driver.values, rows, settings, limits, at, np.int32(number))
                parts.append(jax.device_get(trace))
                if np.all(parts[-1].held[:, -1] > rollout.HELD) and (number + 1) * self.driver.turn > LATEST + rollout.HELD:
                    break
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *parts)


def have_two(numbers: np.ndarray, share: float) -> np.ndarray:
    """Which of a cell's episodes have two cubes: evenly spread."""
    return np.floor((numbers + 1) * share) > np.floor(numbers * share)


def _seeds(seed: int, episodes: Episodes) -> np.ndarray:
    """Of the noise, one an episode."""
    return (seed % 2**8 * len(ROBOTS) * len(TASKS) * MOST + episodes.serial).astype(np.int32)


def _begins(seed: int, episodes: Episodes) -> np.ndarray:
    """The step at which the recording of each begins."""
    drawn = [np.random.default_rng((seed, serial)).integers(rollout.Jolted.STEPS, LATEST + 1) for serial in episodes.serial.tolist()]
    return np.where(episodes.number // 2 % WHOLE, drawn, 0).astype(np.int32)  # not of the same ones as have two cubes


def recordings_of(attempts: Sequence[Attempt], robot: Robot, every: int = 1) -> Iterator[Recording]:
    """Cameras look at the first step and then `every` so many, and show until then what they saw. All looks are drawn together."""
    looks = [_looks(attempt, every) for attempt in attempts]
    pictures = drawn(*jax.tree.map(lambda *leaves: np.concatenate(leaves), *looks))
    counts = [len(states.joints) for _, states in looks]
    taken = [JOINTS if dimension.kind == "gripper" else i for i, dimension in enumerate(robot.state)]
    for attempt, seen in zip(attempts, np.split(pictures, np.cumsum(counts)[:-1]), strict=True):
        numbers = np.concatenate([attempt.states.joints, attempt.states.opening[:, None]], axis=1)
        shown = seen[np.arange(len(numbers)) // every]
        images = {camera.name: shown[:, i] for i, camera in enumerate(robot.cameras)}
        yield Recording(attempt.instruction, numbers[:, taken], attempt.actions[:, taken], images)


def _looks(attempt: Attempt, every: int) -> tuple[Setting, State]:
    states = jax.tree.map(lambda x: x[::every], attempt.states)
    count = len(states.joints)
    return jax.tree.map(lambda x: np.broadcast_to(x, (count, *np.shape(x))), attempt.setting), states
