"""Intents of a whole set of demonstrations, made once for training: `blm data features`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from blm_jax import counts
from blm_jax import mesh as meshes
from blm_jax.batch import Prompts
from blm_jax.config import BackboneConfig, HardwareConfig, PolicyConfig
from blm_jax.configfile import suggest
from blm_jax.data.demos import intents as store
from blm_jax.data.demos.demonstrations import Demonstrations, open_demonstrations
from blm_jax.data.demos.intents import Form, FrameSet, Plan
from blm_jax.data.demos.moments import ROOM, Augmentation, FrameRows, Prompter, key_of, observe, used_frames
from blm_jax.data.demos.observation import Observation, encode, intent_tokens
from blm_jax.data.demos.robots import Robot, find_robot, limits, load_robots
from blm_jax.data.demos.survey import read_survey
from blm_jax.data.files import one_line, open_path
from blm_jax.data.loader import Loader
from blm_jax.data.prompt import Example
from blm_jax.data.vision.augment import AugmentConfig
from blm_jax.errors import RequestError
from blm_jax.infer.act import Actor, Intent, load_below, load_policy
from blm_jax.models.mllm import Mllm
from blm_jax.weights.engine import open_engine
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.policy import PolicyFiles, check_backbone, has_policy, read_policy
from blm_jax.weights.source import read_config

ROWS = 8  # of a batch, for each part into which the mesh cuts it: more than enough for products to be bound by multiplying
OF_PEAK = 0.5  # what a chip is taken to reach
PROBE = 2**26  # bytes read to measure a disk
JUDGED = 8  # observations by which int8 is judged


@dataclass(frozen=True)
class Request:
    """What `blm data features` is asked for."""

    model: str
    sets: tuple[str, ...]
    robot: str
    stats: str
    out: str
    policy: PolicyConfig | None = None  # that is to be trained; None: the model's own
    robots_files: tuple[str, ...] = ()
    form: Form = "bfloat16"
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(versions=1))
    room: int = ROOM
    every: int = 1  # steps from one frame of an episode to the next
    per_shard: int = 1024  # frames
    workers: int = 0
    chip: str | None = None
    chips: int = 1  # that one disk feeds
    read_rate: float | None = None  # of the disk, bytes a second
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if self.augmentation.versions > 1 and self.augmentation.changes == AugmentConfig():
            raise RequestError(f"{self.augmentation.versions} versions of pictures that nothing changes are all the same: say what changes")


class Opened(NamedTuple):
    """A request, looked at: nothing large is read."""

    policy: PolicyConfig
    files: PolicyFiles | None  # of the model's own policy, if it is for that
    backbone: BackboneConfig
    robot: Robot
    demonstrations: list[Demonstrations]
    prompter: Prompter


def features(request: Request, *, dry_run: bool = False) -> dict[str, Any]:
    """Make the intents, or what of them is lacking. What `blm data features --json` prints."""
    opened = _open(request)
    told = estimate(request, opened)
    if dry_run:
        told |= compare(request, told)
    if jax.process_index() == 0:
        print(report(told), file=sys.stderr)
    return told if dry_run else told | _make(request, opened, told)


def _open(request: Request) -> Opened:
    backbone = read_config(request.model)
    if request.policy is not None:
        files, policy = None, request.policy
    elif has_policy(request.model):
        files = read_policy(request.model)
        policy = files.config
    else:
        raise RequestError(f"{request.model} has no policy/: name the run that is to train one with --run")
    check_backbone(policy, backbone)
    robot = find_robot(request.robot, load_robots(request.robots_files))
    survey = read_survey(request.stats, robot)
    if len(set(request.sets)) < len(request.sets):
        raise RequestError("a set is named twice")
    demonstrations = [open_demonstrations(path, robot, survey, every=request.every) for path in request.sets]
    for one in demonstrations:
        if not len(one):
            raise RequestError(f"{one.source.path} has no good episode: leave it out")
    prompter = Prompter(partial(open_engine, request.model), policy.instruction, [robot], request.room)
    return Opened(policy, files, backbone, robot, demonstrations, prompter)


# --- before it starts --------------------------------------------------------------------------------------------------------


def estimate(request: Request, opened: Opened) -> dict[str, Any]:
    """How much will be stored, and read in training. Nothing is counted but windows; the first step of each set stands for its others."""
    examples = [_example(one, opened) for one in opened.demonstrations]
    steps = [len(one) + one.episodes for one in opened.demonstrations]  # an episode may have an observation after its last action
    frames = sum(steps) * request.augmentation.versions
    seen = [intent_tokens(example, opened.backbone, opened.policy.instruction)[0].sum() for example in examples]
    tokens = float(np.average(seen, weights=steps))
    frame_bytes = tokens * store.token_bytes(request.form, opened.policy.intent_width)
    told: dict[str, Any] = {
        "out": request.out,
        "form": request.form,
        "frames": frames,
        "prompt_tokens": len(examples[0].tokens),
        "frame_tokens": round(tokens, 1),
        "frame_bytes": round(frame_bytes),
        "bytes": round(frames * frame_bytes),
        "free_bytes": _free(open_path(request.out)),
        "window_bytes": round(2 * frame_bytes),  # a window is read at its step and a chunk later
    }
    name, chip = _chip(request)
    if chip is not None:
        speed = OF_PEAK * chip.tflops * 1e12 * request.chips
        sizes = [(picture.grid.rows, picture.grid.columns) for picture in examples[0].pictures]
        look = counts.intent_operations(opened.backbone, opened.policy, sizes, len(examples[0].tokens))
        learn_s = counts.learning_operations(opened.policy, round(tokens)) / speed
        told |= {
            "chip": name,
            "chips": request.chips,
            "learn_s": learn_s,
            "look_s": look / speed,
            "read_rate_wanted": 2 * frame_bytes / learn_s,
        }
    return told


def _example(demonstrations: Demonstrations, opened: Opened) -> Example:
    seen = observe(demonstrations, *demonstrations.locate(0), Augmentation(), 0)
    return encode(seen, opened.robot, opened.prompter.engine, opened.prompter.instruction)


def _chip(request: Request) -> tuple[str, counts.Chip | None]:
    if request.chip is None:
        name = jax.devices()[0].device_kind
        return name, counts.chip_of(name)
    if request.chip not in counts.CHIPS:
        raise RequestError(f"no chip {request.chip!r} is known{suggest(request.chip, counts.CHIPS)}; there are {', '.join(counts.CHIPS)}")
    return request.chip, counts.CHIPS[request.chip]


def compare(request: Request, told: dict[str, Any]) -> dict[str, Any]:
    """Seconds that a moment of training takes: with the backbone's look at it and at its future, or with reading both meanwhile."""
    if "chip" not in told:
        raise RequestError(f"name the hardware to compare on with --chip: there are {', '.join(counts.CHIPS)}")
    rate = request.read_rate or measured_rate(_there(open_path(request.out)))
    read_s = told["window_bytes"] / rate
    online, cached = told["learn_s"] + 2 * told["look_s"], max(told["learn_s"], read_s)
    return {
        "read_rate": rate,
        "read_s": read_s,
        "online_s": online,
        "cached_s": cached,
        "making_s": told["frames"] * told["look_s"],
        "better": "cached" if cached < online else "online",
    }


def measured_rate(directory: epath.Path) -> float:
    """Bytes a second of a file that the system does not remember."""
    if "://" in os.fspath(directory):
        raise RequestError(f"{directory} lies in a bucket: say with --read-rate what it gives to one host")
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(os.urandom(PROBE))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(2**20):
                pass
            return PROBE / (time.perf_counter() - start)
    except OSError as error:
        why = error.strerror or one_line(error)
        raise RequestError(f"{directory} cannot be measured: {why}; say with --read-rate what its disk gives") from error


def _there(path: epath.Path) -> epath.Path:
    """The directory above that exists."""
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise RequestError(f"{path} is a file: choose a directory")
    return path


def _free(path: epath.Path) -> int | None:
    """Bytes that may still be written beside what a run before has written; nothing is known of a bucket."""
    if "://" in os.fspath(path):
        return None
    there = _there(path)
    written = sum(shard.stat().length for shard in path.glob("hidden-*.bin")) if there == path else 0
    return shutil.disk_usage(there).free + written


def report(told: dict[str, Any]) -> str:
    """What is known before the start, to be read."""
    free = "" if told["free_bytes"] is None else f", and {_size(told['free_bytes'])} are free"
    lines = [
        f"{told['out']}: up to {told['frames']} frames of {told['frame_tokens']:g} tokens, {_size(told['frame_bytes'])} each, "
        f"{_size(told['bytes'])} as {told['form']}{free}",
        f"training reads {_size(told['window_bytes'])} a window",
    ]
    if "chip" in told:
        lines[-1] += (
            f": {_size(told['read_rate_wanted'])}/s keep {told['chips']} {told['chip']} busy, "
            f"which learn from {1 / told['learn_s']:.0f} windows a second at {OF_PEAK:.0%} of their peak"
        )
    if "better" in told:
        lines.append(
            f"a window takes {1e3 * told['cached_s']:.3g} ms cached ({_size(told['read_rate'])}/s are read) and "
            f"{1e3 * told['online_s']:.3g} ms online; making the intents takes {told['making_s'] / 3600:.2g} h, "
            f"as long as the looks of {told['frames'] / 2:.0f} windows: {told['better']} is faster"
        )
    return "\n".join(lines)


def _size(count: float) -> str:
    return tqdm.format_sizeof(count, "B")


# --- making --------------------------------------------------------------------------------------------------------------------


def _make(request: Request, opened: Opened, told: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    directory = open_path(request.out)
    store.check_new(directory)
    if told["free_bytes"] is not None and told["bytes"] > told["free_bytes"]:
        raise RequestError(
            f"{request.out} needs {_size(told['bytes'])}, and {_size(told['free_bytes'])} are free: "
            "choose another disk, --form int8, or fewer versions"
        )
    # Each process works on shards of its own, and on a mesh of its own devices.
    mesh = meshes.make_mesh(request.hardware.mesh, jax.local_devices())
    leads = jax.process_index() == 0
    sets, state, action = used_frames(opened.demonstrations, show=leads)
    plan = _plan(request, opened, sets)
    if leads:
        store.begin(directory, plan)
    _together("begun")
    backbone = load_below(request.model, opened.policy, mesh, request.hardware.compute)
    shards = [number for number in range(plan.shards)[jax.process_index() :: jax.process_count()] if not store.finished(directory, number)]
    count = ROWS * meshes.batch_shards(mesh)
    rows = FrameRows(plan, shards, opened.demonstrations, opened.prompter, request.augmentation, count)
    look = partial(_look, backbone, blocks=opened.policy.intent_block, dtype=np.float32 if plan.form == "int8" else plan.dtype)
    _write(rows, directory, look, mesh, request.workers)
    _together("made")
    result: dict[str, Any] = {"made": sum(len(plan.shard(number)) for number in shards)}
    if leads:
        if request.form == "int8":
            result["action_error"] = _judged(request, opened, backbone, mesh)
        result |= store.finish(directory, plan, state, action)
    _together("finished")
    return result | {"seconds": time.perf_counter() - start}


def _together(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"intents: {what}")


def _plan(request: Request, opened: Opened, sets: tuple[FrameSet, ...]) -> Plan:
    config, versions = opened.policy, request.augmentation.versions
    engine, dtype = opened.prompter.engine, request.hardware.compute.dtype
    key = key_of(engine, config, opened.robot, _fingerprint(request.model), request.augmentation, dtype)
    return Plan(opened.robot.name, key, request.form, config.intent_width, versions, request.per_shard, sets, request.every)


def _fingerprint(model: str) -> str:
    """Of the backbone, all of which is read for it: by one process."""
    if jax.process_count() == 1:
        return fingerprint(model, show=True)
    text = fingerprint(model, show=True) if jax.process_index() == 0 else ""
    return bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(80).encode(), np.uint8))).decode().strip()


def _write(rows: FrameRows, directory: epath.Path, look: Callable[[Prompts], jax.Array], mesh: Mesh, workers: int) -> None:
    loader = Loader(rows, workers=workers)
    total = sum(len(rows.plan.shard(number)) for number in rows.shards)
    with tqdm(total=total, unit=" frames", desc="intents", disable=None if jax.process_index() == 0 else True) as bar:
        frames = _frames(rows, loader, look, mesh, bar)
        for number in rows.shards:
            store.write_shard(directory, rows.plan, number, islice(frames, len(rows.plan.shard(number))))
    loader.close()


def _frames(
    rows: FrameRows, loader: Loader[Prompts], look: Callable[[Prompts], jax.Array], mesh: Mesh, bar: tqdm
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hidden states and places of intent, frame by frame. The devices look at a batch while the host stores the one before."""
    seen: list[tuple[Prompts, jax.Array]] = []
    for step in range(rows.steps + 1):
        if step < rows.steps:
            prompts = next(loader)
            with meshes.use(mesh):
                seen.append((prompts, look(meshes.put(prompts, mesh))))
        if step:
            prompts, looked = seen.pop(0)
            hidden = np.asarray(looked)
            for row in range(rows.rows):
                if rows.frame(step - 1, row) is not None:
                    own = prompts.mask[row]
                    yield hidden[row][own], prompts.places[row][own]
                    bar.update()


@partial(jax.jit, static_argnames=("blocks", "dtype"))
def _look(backbone: Mllm, prompts: Prompts, blocks: int, dtype: np.dtype) -> jax.Array:
    return backbone.intent(prompts, blocks).hidden.astype(dtype)


# --- how much int8 matters ---------------------------------------------------------------------------------------------------


def _judged(request: Request, opened: Opened, backbone: Mllm, mesh: Mesh) -> dict[str, float] | None:
    """Of the policy that is there, if it drives this robot."""
    files, robot = opened.files, opened.robot
    if files is None or robot.name not in files.statistics or files.robots[robot.name] != robot:
        return None
    actor = Actor(backbone, load_policy(request.model, files, mesh, request.hardware.compute), files, opened.prompter.engine, mesh)
    demonstrations = opened.demonstrations[0]
    low, high = limits(robot.state)
    observations = []
    for index in np.linspace(0, len(demonstrations) - 1, min(JUDGED, len(demonstrations))).astype(int).tolist():
        seen = observe(demonstrations, *demonstrations.locate(index), request.augmentation, 0)
        observations.append(replace(seen, state=np.clip(seen.state, low, high)))
    return action_error(actor, observations, robot.name)


def action_error(actor: Actor, observations: Sequence[Observation], robot: str, samples: int = 4) -> dict[str, float]:
    """How far actions are from those of float32 intents, by form: root of the mean square, in the robot's units."""
    names = [robot] * len(observations)
    rows = actor.intent(observations, names).rows
    exact = np.asarray(rows.hidden, np.float32)

    def actions(form: Form) -> np.ndarray:
        data = np.frombuffer(store.to_bytes(exact.reshape(-1, exact.shape[-1]), form), np.uint8)
        hidden = store.from_bytes(data, form, exact.shape[-1]).astype(np.float32).reshape(exact.shape)
        stored = replace(rows, hidden=jax.device_put(hidden, rows.hidden.sharding))
        return np.stack(actor.sample_actions(observations, names, samples=samples, intent=Intent(tuple(names), stored)))

    wanted = actions("float32")
    lossy: tuple[Form, ...] = ("bfloat16", "int8")
    return {form: float(np.sqrt(np.mean((actions(form) - wanted) ** 2))) for form in lossy}
