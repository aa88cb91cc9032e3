"""An observation: what a robot gives to the policy, what the policy makes of it, and what it gives back.

A file of n observations of one robot is an .npz with the arrays

    state            [n, dims]         numbers, in the units and the order of the robot's entry
    images/<camera>  [n, H, W, 3]      uint8, one array a camera of the robot
    instruction      [n], or one text  the task in words

A file of chunks is an .npz with the arrays

    actions          [n, samples, horizon, dims]  float32, absolute, within the robot's limits
    names, units     [dims]                       of the action's dimensions
    robot, hz, executed                           whose they are, steps a second, and steps to take before asking again
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from blm_jax.batch import Prompts
from blm_jax.config import BackboneConfig, Instruction
from blm_jax.configfile import suggest
from blm_jax.data.collate import collate
from blm_jax.data.demos.robots import Camera, Dimension, Robot, clip
from blm_jax.data.files import one_line, open_path, write_whole
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.errors import RequestError, RunError

IMAGES = "images/"
# How far beyond its limits, as a share of their range, a state may be: controllers overshoot, degrees go much further.
OVERSHOOT = 0.1


@dataclass(frozen=True)
class Observation:
    state: np.ndarray  # [dims]
    images: Mapping[str, np.ndarray] | Sequence[tuple[str, np.ndarray]]  # [H, W, 3] uint8 by camera; a list must be in the robot's order
    instruction: str


# --- the contract ------------------------------------------------------------------------------------------------------------


def check(observation: Observation, robot: Robot) -> Observation:
    """The observation as the robot's entry wants it: its state float32, its pictures by name in the order of the cameras."""
    return Observation(
        check_state(observation.state, robot), _checked_images(observation.images, robot), _checked_text(observation.instruction)
    )


def check_state(state: Any, robot: Robot) -> np.ndarray:
    """[dims] float32."""
    try:
        values = np.asarray(state, np.float64)
    except (TypeError, ValueError):
        raise RequestError(f"the state of {robot.name} must be an array of {len(robot.state)} numbers") from None
    if values.shape != (len(robot.state),):
        names = ", ".join(dimension.name for dimension in robot.state)
        raise RequestError(f"the state of {robot.name} has the shape {list(values.shape)}, not [{len(robot.state)}]: give {names}")
    _check_values(values, robot.state, "state", robot.name)
    return values.astype(np.float32)


def _check_values(values: np.ndarray, dimensions: Sequence[Dimension], what: str, whose: str) -> None:
    """values [..., dims]: finite, and near their limits at least."""
    room = np.array([OVERSHOOT * (dimension.high - dimension.low) for dimension in dimensions])
    low, high = (np.array([getattr(dimension, side) for dimension in dimensions]) for side in ("low", "high"))
    wrong = np.argwhere(~((low - room <= values) & (values <= high + room)))  # this way round for NaN
    if not len(wrong):
        return
    i, value = wrong[0, -1], float(values[tuple(wrong[0])])
    dimension = dimensions[i]
    if not np.isfinite(value):
        raise RequestError(f"{what} {i} ({dimension.name}) of {whose} is {value}: it must be a finite number")
    raise RequestError(
        f"{what} {i} ({dimension.name}) of {whose} is {value:g}, far outside its limits of {dimension.low:g} to "
        f"{dimension.high:g} {dimension.unit}: {_unit_hint(value, dimension, what)}"
    )


def _unit_hint(value: float, dimension: Dimension, what: str) -> str:
    if dimension.unit == "rad" and dimension.low <= np.deg2rad(value) <= dimension.high:
        return "is it in degrees? give radians"
    if dimension.kind == "gripper":
        return "give the gripper's opening, 0 closed and 1 open"
    return f"check the order of the {what} and its units"


def _checked_images(images: Any, robot: Robot) -> dict[str, np.ndarray]:
    wanted = [camera.name for camera in robot.cameras]
    if not isinstance(images, Mapping):
        images = _named(images, robot)
        names = [name for name, _ in images]
        if sorted(names) == sorted(wanted) and names != wanted:
            raise RequestError(f"the cameras of {robot.name} come as {', '.join(wanted)}, not {', '.join(names)}: reorder the list")
        if len(set(names)) < len(names):
            raise RequestError(f"the cameras {', '.join(names)} name one of them twice: give each once")
        images = dict(images)
    for name in images:
        if name not in wanted:
            raise RequestError(f"{robot.name} has no camera {name!r}{suggest(str(name), wanted) or '; it has ' + ', '.join(wanted)}")
    for name in wanted:
        if name not in images:
            raise RequestError(f"the picture of camera {name} is missing: {robot.name} needs {', '.join(wanted)}")
    return {camera.name: _checked_image(images[camera.name], camera) for camera in robot.cameras}


def _named(images: Any, robot: Robot) -> list[tuple[str, Any]]:
    try:
        pairs: list[tuple[Any, Any]] = [(name, image) for name, image in images]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    if not all(isinstance(name, str) for name, _ in pairs):
        names = ", ".join(camera.name for camera in robot.cameras)
        raise RequestError(f"pictures are given by the names of their cameras, {names}, not as {type(images).__name__} of pictures alone")
    return pairs


def _checked_image(image: Any, camera: Camera) -> np.ndarray:
    size = f"[{camera.height}, {camera.width}, 3]"
    if not isinstance(image, np.ndarray):
        raise RequestError(f"the picture of camera {camera.name} must be an array {size} of uint8, not {type(image).__name__}")
    if image.shape == (3, camera.height, camera.width):
        raise RequestError(f"the picture of camera {camera.name} is {list(image.shape)}, not {size}: move its channels to the end")
    if image.shape != (camera.height, camera.width, 3):
        raise RequestError(
            f"the picture of camera {camera.name} is {list(image.shape)}, not {size}: resize it to {camera.width}x{camera.height} pixels"
        )
    if image.dtype != np.uint8:
        raise RequestError(f"the picture of camera {camera.name} is {image.dtype}, not uint8: scale it to 0..255 and convert it")
    return image


def _checked_text(instruction: Any) -> str:
    if not isinstance(instruction, str):
        raise RequestError(f"the instruction must be text, not {type(instruction).__name__}")
    if not instruction.strip():
        raise RequestError("the instruction is empty: say in words what the robot shall do")
    return instruction


def check_last(last: Sequence[Any] | None, delay: int, robots: Sequence[Robot], samples: int, prefix: int) -> list[np.ndarray] | None:
    """What is left of last chunks, [samples, steps, dims] each, within the robots' limits; None if there are none.

    `last` holds [steps, dims] for each robot, or a chunk for each sample; the first `delay` steps will have been executed when
    the new chunk is ready. `prefix` is how many given steps a policy was trained with, 0 for one that is guided.
    """
    if last is None:
        if delay:
            raise RequestError(f"the delay is {delay}, but of which chunk? Give what is left of the last one")
        return None
    if len(last) != len(robots):
        raise RequestError(f"there are {len(last)} last chunks for {len(robots)} observations: give as many")
    left = [_checked_left(one, robot, samples) for one, robot in zip(last, robots, strict=True)]
    lengths = sorted({one.shape[1] for one in left})
    if len(lengths) > 1:
        raise RequestError(f"of the last chunks {' and '.join(map(str, lengths))} steps are left: cut them to the same number")
    if isinstance(delay, bool) or not isinstance(delay, int | np.integer) or not 0 <= delay <= lengths[0]:
        raise RequestError(f"the delay is {delay}: it is a whole number of steps, from 0 to the {lengths[0]} left of the last chunk")
    if prefix and delay > prefix:
        raise RequestError(
            f"the delay is {delay} steps, but the policy was trained with at most {prefix} given: ask sooner, or train with a longer prefix"
        )
    return left


def _checked_left(left: Any, robot: Robot, samples: int) -> np.ndarray:
    dims = len(robot.action)
    try:
        values = np.asarray(left, np.float64)
    except (TypeError, ValueError):
        raise RequestError(f"what is left of {robot.name}'s last chunk must be an array [steps, {dims}] of numbers") from None
    if values.ndim not in (2, 3) or values.shape[-1] != dims or values.shape[:-2] not in ((), (samples,)):
        shapes = f"[steps, {dims}] or, a chunk for each sample, [{samples}, steps, {dims}]"
        raise RequestError(f"what is left of {robot.name}'s last chunk has the shape {list(values.shape)}, not {shapes}")
    if values.shape[-2] > robot.horizon:
        raise RequestError(f"{values.shape[-2]} steps are left of {robot.name}'s last chunk, more than the {robot.horizon} of a chunk")
    _check_values(values, robot.action, "action", f"{robot.name}'s last chunk")
    return np.broadcast_to(clip(values, robot), (samples, *values.shape[-2:]))


# --- files ---------------------------------------------------------------------------------------------------------------------


def read_observations(path: epath.PathLike) -> list[Observation]:
    """The observations of a file, in order. Whether they fit a robot, `check` says."""
    arrays = _read_arrays(open_path(path))
    cameras = [name for name in arrays if name.startswith(IMAGES)]
    known = ("state", "instruction")
    for name in arrays:
        if name not in known and name not in cameras:
            near = suggest(name, (*known, IMAGES)) or f"; it holds {', '.join(known)} and {IMAGES}<camera>"
            raise RequestError(f"{path}: {name!r} is no part of an observation{near}")
    for name in known:
        if name not in arrays:
            raise RequestError(f"{path} has no array {name!r}: it wants state [n, dims], instruction and {IMAGES}<camera> [n, H, W, 3]")
    state, instruction = arrays["state"], arrays["instruction"]
    if state.ndim != 2 or state.dtype.kind not in "fiu":
        raise RequestError(f"{path}: state must be numbers [n, dims], not {state.dtype} {list(state.shape)}")
    if instruction.dtype.kind != "U" or instruction.ndim > 1:
        raise RequestError(f"{path}: instruction must be one text or [n] texts, not {instruction.dtype} {list(instruction.shape)}")
    count = len(state)
    if count == 0:
        raise RequestError(f"{path} holds no observation")
    for name in (*cameras, *(["instruction"] if instruction.ndim else [])):
        if arrays[name].ndim == 0 or len(arrays[name]) != count:
            raise RequestError(f"{path}: {name} is {list(arrays[name].shape)}, but state holds {count} observations: give as many")
    texts = np.broadcast_to(instruction, (count,)).tolist()
    return [Observation(state[i], {name.removeprefix(IMAGES): arrays[name][i] for name in cameras}, texts[i]) for i in range(count)]


def _read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise RequestError(f"{path} is a single array (.npy): write an .npz with numpy.savez")
        return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{path} cannot be read as an .npz of plain arrays: {one_line(error)}") from error


def read_last(path: epath.PathLike, robot: Robot) -> list[np.ndarray]:
    """Of a file of chunks, what is left of each when `executed` steps are taken: [steps, dims], or [samples, steps, dims] of several."""
    arrays = _read_arrays(open_path(path))
    missing = [name for name in ("actions", "robot", "executed") if name not in arrays]
    if missing:
        raise RequestError(f"{path} has no {', '.join(missing)}: it is no file of chunks, as `blm act` writes them")
    actions, whose, executed = arrays["actions"], arrays["robot"], arrays["executed"]
    if str(whose) != robot.name:
        raise RequestError(f"{path} holds chunks of {whose}, not of {robot.name}")
    numbers = actions.ndim == 4 and actions.dtype.kind == "f" and executed.ndim == 0 and executed.dtype.kind in "iu"
    if not numbers or not 0 <= executed <= actions.shape[2]:
        raise RequestError(f"{path}: actions must be numbers [n, samples, horizon, dims], and executed some steps of a horizon")
    return [chunks[0] if len(chunks) == 1 else chunks for chunks in actions[:, :, int(executed) :]]


def check_output(path: epath.PathLike) -> None:
    """Refuses, before any work is done, a file that is there already."""
    if open_path(path).exists():
        raise RequestError(f"{path} exists; choose another file or remove it")


def write_chunks(path: epath.PathLike, actions: np.ndarray, robot: Robot) -> None:
    """Absolute actions [n, samples, horizon, dims], clipped to the robot's limits, in a file that appears whole or not at all."""
    check_output(path)
    if actions.ndim != 4 or actions.shape[2:] != (robot.horizon, len(robot.action)):
        raise ValueError(f"actions {list(actions.shape)} are not [n, samples, {robot.horizon}, {len(robot.action)}]")
    if not np.isfinite(actions).all():
        raise RunError(f"the policy gave actions that are not finite: nothing was written to {path}")
    contents = io.BytesIO()
    np.savez(
        contents,
        actions=clip(actions, robot),
        names=np.array([dimension.name for dimension in robot.action]),
        units=np.array([dimension.unit for dimension in robot.action]),
        robot=np.array(robot.name),
        hz=np.array(robot.hz),
        executed=np.array(robot.executed),
    )
    write_whole(open_path(path), contents.getvalue())


# --- the prompt ----------------------------------------------------------------------------------------------------------------


def messages_for(observation: Observation, robot: Robot, instruction_first: bool) -> list[dict[str, Any]]:
    """What the prompt engine reads: the pictures in the order of the cameras, the instruction before or behind them."""
    images = dict(observation.images)
    pictures = [{"type": "image", "image": images[camera.name]} for camera in robot.cameras]
    text = [{"type": "text", "text": observation.instruction}]
    return [{"role": "user", "content": text + pictures if instruction_first else pictures + text}]


def encode(observation: Observation, robot: Robot, engine: PromptEngine, instruction: Instruction) -> Example:
    """What the backbone reads of an observation: the user's turn, and the start of an answer that is never written."""
    return engine.encode(messages_for(observation, robot, instruction == "before"), add_generation_prompt=True)


def prompts_of(examples: Sequence[Example | None], config: BackboneConfig, instruction: Instruction, length: int, **layout: Any) -> Prompts:
    """An observation a row, or nothing; `layout` says how pictures are laid out, see `collate`."""
    batch = collate([[] if example is None else [example] for example in examples], config, length=length, **layout)
    mask = np.zeros((len(examples), length), bool)
    places = np.zeros((len(examples), length, 4), np.int32)
    for i, example in enumerate(examples):
        if example is not None:
            n = len(example.tokens)
            mask[i, :n], places[i, :n] = intent_tokens(example, config, instruction)
    return Prompts(batch, mask, places)


def intent_tokens(example: Example, config: BackboneConfig, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of an example are intent, [n] bool, and where each was seen, [n, 4] int32.

    Intent begins with the first visual token, or behind the last one where the instruction is intent alone, and ends with the prompt:
    answers are none. A visual token was seen at (camera counted from 1, row, column, time), in visual tokens; text at zeros.
    """
    visual = np.isin(example.tokens, (config.tokens.image, config.tokens.video))
    if not visual.any():
        raise RequestError("there is no picture, and intent begins with one")
    begin = np.flatnonzero(visual)[-1] + 1 if instruction == "alone" else np.argmax(visual)
    mask = (np.arange(len(visual)) >= begin) & ~example.supervised
    places = np.zeros((len(visual), 4), np.int32)
    places[visual] = np.concatenate([_places(i, example, config) for i in range(len(example.pictures))])
    return mask, places


def _places(index: int, example: Example, config: BackboneConfig) -> np.ndarray:
    """Of the visual tokens of one picture, [tokens, 4], in their order."""
    grid, merge = example.pictures[index].grid, config.vision.merge
    time, row, column = np.indices((grid.frames, grid.rows // merge, grid.columns // merge)).reshape(3, -1)
    return np.stack([np.full_like(row, index + 1), row, column, time], axis=1)
