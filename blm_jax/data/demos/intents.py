"""Cached intents: what the frozen backbone makes of a set of demonstrations, kept for training.

    intents.json      what they are of, and the key: all that they depend on; written last
    hidden-00000.bin  hidden states of so many frames, one after the other: [tokens, width] each, of intent's tokens alone
    offsets.npy       [frames + 1] int64, the token at which each frame begins
    layout.npy        [frames] uint16, how each frame's tokens lie
    layouts.npz       where tokens of each layout were seen: they are as many as there are lengths of instructions
    state.npy         [steps, dims] float32, and action.npy: the numbers of the demonstrations, so that no picture is opened for them

A frame is a step of an episode as a window sees it, now or a chunk later; it is stored once for both, and frames that no window uses are
not there. Windows may begin at one step in so many; numbers are those of all steps. Intent begins with the first visual token. So what
stands before the pictures, the same in every prompt, is not stored at all; what follows them attends to them, and is the frame's own.

Frames are numbered version by version (each augmented in its own way), set by set, episode by episode, step by step; the n-th so
many are the n-th shard. A shard is finished when its note is there, hidden-00000.npz; notes become the other files in the end.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from etils import epath

from blm_jax.data.demos.episodes import Stamp, stamp
from blm_jax.data.files import one_line, open_path, read_json, write_whole
from blm_jax.errors import RequestError, RunError

FORMAT = 1
INFO, MAKING = "intents.json", "making.json"
AGAIN = "make it again with blm data features"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE = np.dtype("<f4")

Form = Literal["bfloat16", "float32", "int8"]


@dataclass(frozen=True)
class FrameSet:
    """A set of demonstrations; an episode that is not used has 0 of both."""

    path: str
    identity: str
    frames: tuple[int, ...]  # of each episode: steps that a window may reach, of which one in `Plan.every` is looked at
    actions: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which frames there are, and how they are stored."""

    robot: str
    key: dict[str, str]  # what they depend on, by readable names
    form: Form
    width: int
    versions: int
    per_shard: int
    sets: tuple[FrameSet, ...]
    every: int = 1  # steps from one frame of an episode to the next

    @cached_property
    def starts(self) -> np.ndarray:
        """The first step of each episode of all sets, and the number of steps."""
        return np.cumsum([0, *(count for one in self.sets for count in one.frames)])

    @cached_property
    def looks(self) -> np.ndarray:
        """The first frame of each episode of all sets, and the number of frames of a version."""
        return np.cumsum([0, *(-(-count // self.every) for one in self.sets for count in one.frames)])

    @cached_property
    def firsts(self) -> list[int]:
        """The first episode of each set."""
        return np.cumsum([0, *(len(one.frames) for one in self.sets)]).tolist()

    @property
    def steps(self) -> int:
        return int(self.starts[-1])

    @property
    def frames(self) -> int:
        return int(self.looks[-1]) * self.versions

    @property
    def shards(self) -> int:
        return -(-self.frames // self.per_shard)

    @property
    def dtype(self) -> np.dtype:
        """As they are read: int8 comes back as bfloat16, which devices compute with."""
        return np.dtype(np.float32) if self.form == "float32" else BFLOAT16

    @property
    def token_bytes(self) -> int:
        return token_bytes(self.form, self.width)

    def shard(self, number: int) -> range:
        """Its frames."""
        return range(number * self.per_shard, min((number + 1) * self.per_shard, self.frames))

    def locate(self, frame: int) -> tuple[int, int, int, int]:
        """Version, set, episode and step."""
        version, place = divmod(frame, int(self.looks[-1]))
        episode = int(np.searchsorted(self.looks, place, side="right")) - 1
        which = int(np.searchsorted(self.firsts, episode, side="right")) - 1
        return version, which, episode - self.firsts[which], (place - int(self.looks[episode])) * self.every


# --- hidden states as bytes --------------------------------------------------------------------------------------------------


def token_bytes(form: Form, width: int) -> int:
    return {"bfloat16": 2 * width, "float32": 4 * width, "int8": width + SCALE.itemsize}[form]


def to_bytes(hidden: np.ndarray, form: Form) -> bytes:
    """Hidden states [tokens, width] as they are stored."""
    if form != "int8":
        return hidden.astype("<f4" if form == "float32" else BFLOAT16).tobytes()
    wide = hidden.astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) / np.float32(127)
    whole = np.rint(wide / np.where(scale > 0, scale, 1)).astype(np.int8)
    return np.concatenate([whole.view(np.uint8), scale.astype(SCALE).view(np.uint8)], axis=1).tobytes()


def from_bytes(data: np.ndarray, form: Form, width: int) -> np.ndarray:
    """[tokens, width] of the uint8 that `to_bytes` gave, of `Plan.dtype`."""
    if form != "int8":
        return data.view("<f4" if form == "float32" else BFLOAT16).reshape(-1, width)
    tokens = data.reshape(-1, width + SCALE.itemsize)
    scale = np.ascontiguousarray(tokens[:, width:]).view(SCALE)
    return (tokens[:, :width].view(np.int8) * scale).astype(BFLOAT16)


# --- writing -----------------------------------------------------------------------------------------------------------------


def check_new(directory: epath.Path) -> None:
    """Refuses, before any work is done, a directory that is whole already, or holds something else."""
    if (directory / INFO).exists():
        raise RequestError(f"{directory} exists; choose another directory or remove it")
    if (directory / MAKING).exists() or not directory.exists():
        return
    if not directory.is_dir():
        raise RequestError(f"{directory} is a file: choose a directory")
    if others := sorted(file.name for file in directory.iterdir() if not file.name.startswith(".")):
        raise RequestError(f"{directory} holds {others[0]} and no intents: choose another directory")


def begin(directory: epath.Path, plan: Plan) -> None:
    """A directory that was begun for the same is gone on with; refuses one that was begun for something else."""
    check_new(directory)
    if (directory / MAKING).exists():
        known = _plan(read_json(directory / MAKING), directory / MAKING)
        other = [f"another {name}" for name, value in plan.key.items() if known.key.get(name) != value]
        other += [
            f"another {name}" for name in ("robot", "form", "per_shard", "sets", "every") if getattr(known, name) != getattr(plan, name)
        ]
        if other or known != plan:
            raise RequestError(f"{directory} was begun with {other[0] if other else 'another width'}: remove it, or choose another")
        return
    write_whole(directory / MAKING, _json(plan))


def finished(directory: epath.Path, number: int) -> bool:
    """Whether a shard is there, from a run before."""
    return _note(directory, number).exists() and _shard(directory, number).exists()


def write_shard(directory: epath.Path, plan: Plan, number: int, frames: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """Hidden states [tokens, width] and places [tokens, 4] of its frames, in order. The shard is there when all are written."""
    layouts: dict[bytes, int] = {}
    ids: list[int] = []
    target, in_bucket = _shard(directory, number), "://" in os.fspath(directory)
    holder = tempfile.gettempdir() if in_bucket else os.fspath(directory)
    partial = Path(holder) / f".{target.name}.{secrets.token_hex(4)}"
    size = 0
    try:
        with partial.open("wb") as file:
            for hidden, places in frames:
                if not np.isfinite(hidden).all():
                    raise RunError(f"the backbone gave an intent that is not finite, of frame {plan.shard(number)[len(ids)]}")
                size += file.write(to_bytes(hidden, plan.form))
                ids.append(layouts.setdefault(np.ascontiguousarray(places, np.int32).tobytes(), len(layouts)))
            file.flush()
            os.fsync(file.fileno())
        if in_bucket:
            epath.Path(partial).copy(target, overwrite=True)
        else:
            partial.rename(target)
        write_whole(_note(directory, number), _note_of(ids, layouts))
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or one_line(error)}; run the same command again to go on") from error
    finally:
        partial.unlink(missing_ok=True)
    return size


def finish(directory: epath.Path, plan: Plan, state: np.ndarray, action: np.ndarray) -> dict[str, Any]:
    """The files beside the shards, when all of these are there. state and action [steps, dims]."""
    layouts: dict[bytes, int] = {}
    layout = np.zeros(plan.frames, np.uint16)
    for number in range(plan.shards):
        own = plan.shard(number)
        layout[own.start : own.stop] = _merged(_note(directory, number), layouts)
    lengths = np.array([len(places) // 16 for places in layouts], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths[layout])])
    _save(directory / "offsets.npy", offsets.astype("<i8"))
    _save(directory / "layout.npy", layout.astype("<u2"))
    _save(directory / "state.npy", state.astype("<f4"))
    _save(directory / "action.npy", action.astype("<f4"))
    write_whole(directory / "layouts.npz", _packed(layouts))
    info = {"frames": plan.frames, "tokens": int(offsets[-1]), "longest": int(lengths.max()), "bytes": int(offsets[-1]) * plan.token_bytes}
    write_whole(directory / INFO, _json(plan, **info))
    for path in [directory / MAKING, *(_note(directory, number) for number in range(plan.shards))]:
        path.unlink(missing_ok=True)
    return info


def _shard(directory: epath.Path, number: int) -> epath.Path:
    return directory / f"hidden-{number:05}.bin"


def _note(directory: epath.Path, number: int) -> epath.Path:
    return directory / f"hidden-{number:05}.npz"


def _note_of(ids: list[int], layouts: Mapping[bytes, int]) -> bytes:
    return _packed(layouts, ids=np.array(ids, np.int64))


def _packed(layouts: Mapping[bytes, int], **beside: np.ndarray) -> bytes:
    """Places of all layouts, [tokens, 4] of each, and how many tokens each has."""
    contents = io.BytesIO()
    places = np.frombuffer(b"".join(layouts), np.int32).reshape(-1, 4)
    arrays: dict[str, Any] = {"places": places, "tokens": np.array([len(one) // 16 for one in layouts], np.int64), **beside}
    np.savez(contents, **arrays)
    return contents.getvalue()


def _merged(note: epath.Path, layouts: dict[bytes, int]) -> np.ndarray:
    """The layouts of a shard's frames, as all shards number them."""
    with np.load(io.BytesIO(note.read_bytes())) as found:
        own = np.split(found["places"], np.cumsum(found["tokens"])[:-1])
        numbers = np.array([layouts.setdefault(places.tobytes(), len(layouts)) for places in own])
        if len(layouts) > np.iinfo(np.uint16).max:
            raise RunError("there are too many lengths of prompts")
        return numbers[found["ids"]]


def _save(path: epath.Path, array: np.ndarray) -> None:
    contents = io.BytesIO()
    np.save(contents, array, allow_pickle=False)
    write_whole(path, contents.getvalue())


def _json(plan: Plan, **info: int) -> bytes:
    return json.dumps({"format": FORMAT, **info, "plan": asdict(plan)}, ensure_ascii=False).encode()


def _plan(content: Mapping[str, Any], path: epath.Path) -> Plan:
    if content.get("format") != FORMAT:
        raise RequestError(f"{path} is of format {content.get('format')!r}, and {FORMAT} is read: {AGAIN}")
    try:
        raw = content["plan"]
        sets = tuple(FrameSet(one["path"], one["identity"], tuple(one["frames"]), tuple(one["actions"])) for one in raw["sets"])
        return Plan(**{**raw, "sets": sets})
    except (KeyError, TypeError) as error:
        raise RequestError(f"{path} was edited, or is damaged: {AGAIN}") from error


# --- reading -----------------------------------------------------------------------------------------------------------------


def open_intents(path: epath.PathLike) -> Intents:
    return Intents(os.fspath(path))


class Intents:
    """Threads may share it, and processes get their own by pickling: it holds nothing but what its files say."""

    def __init__(self, path: str):
        self.path = path
        self._directory = open_path(path)
        info = self._directory / INFO
        if not info.exists():
            begun = (self._directory / MAKING).exists()
            wrong = "is not finished: run the same blm data features again, and it goes on" if begun else f"holds no intents: {AGAIN}"
            raise RequestError(f"{path} {wrong}")
        content = read_json(info)
        self.plan = _plan(content, info)
        try:
            self.longest = int(content["longest"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{info} is damaged: it does not say how long the longest intent is; {AGAIN}") from error
        offsets, layout, state, action = (_array(self._directory / f"{name}.npy") for name in ("offsets", "layout", "state", "action"))
        if (len(offsets), len(layout), len(state), len(action)) != (
            self.plan.frames + 1,
            self.plan.frames,
            self.plan.steps,
            self.plan.steps,
        ):
            raise RunError(f"{path} is damaged: its files do not hold {self.plan.frames} frames; {AGAIN}")
        self._offsets, self._layout, self._state, self._action = offsets, layout, state, action
        self._layouts = _layouts(self._directory / "layouts.npz")
        self._shards = [os.fspath(_shard(self._directory, number)) for number in range(self.plan.shards)]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_intents, (self.path,)

    def check(self, key: Mapping[str, str], every: int = 1) -> None:
        """Refuses intents that depend on something that is another now, or are of other steps than windows begin at."""
        if self.plan.every != every:
            raise RequestError(
                f"{self.path} looks at one step in {self.plan.every}, and windows begin at one in {every}: make it again with "
                f"blm data features --run, which takes the run's stage_two.every, or set that to {self.plan.every}"
            )
        for name, now in key.items():
            then = self.plan.key.get(name)
            if then != now:
                told = "" if "sha256:" in f"{then}{now}" else f" ({then}, not {now})"
                raise RequestError(f"{self.path} was made with another {name}{told}: {AGAIN}")

    def find(self, path: epath.PathLike, identity: str, actions: Sequence[int]) -> int:
        """The number of a set of demonstrations, as it is now."""
        for number, one in enumerate(self.plan.sets):
            if one.identity == identity:
                if list(one.actions) != list(actions):
                    raise RequestError(f"{self.path} was made with another survey of {path}, with other bad episodes: {AGAIN}")
                return number
        raise RequestError(f"{self.path} was made with another set: {path} is none of its sets, or was changed since: {AGAIN}")

    def numbers(self, which: int, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """States [frames, dims] and actions [actions, dims] of an episode, float32."""
        first, last = self._episode(which, episode)
        return self._state[first:last], self._action[first : first + self.plan.sets[which].actions[episode]]

    def frame(self, which: int, episode: int, step: int, version: int) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [tokens, width] of a frame, float32 or bfloat16, and places [tokens, 4]."""
        first, last = self._episode(which, episode)
        if not (0 <= step < last - first and step % self.plan.every == 0 and 0 <= version < self.plan.versions):
            raise IndexError(f"{self.path} has no version {version} of step {step} of episode {episode}")
        looks = self.plan.looks
        number = version * int(looks[-1]) + int(looks[self.plan.firsts[which] + episode]) + step // self.plan.every
        hidden = from_bytes(self._bytes(number), self.plan.form, self.plan.width)
        return hidden, self._layouts[self._layout[number]]

    def _episode(self, which: int, episode: int) -> tuple[int, int]:
        number = self.plan.firsts[which] + episode
        return int(self.plan.starts[number]), int(self.plan.starts[number + 1])

    def _bytes(self, number: int) -> np.ndarray:
        """uint8. Of a bucket, one request; else the part of a mapped file, whose pages the system keeps if there is room."""
        shard = number // self.plan.per_shard
        own = self.plan.shard(shard)
        begin, first, last, end = (int(self._offsets[place]) * self.plan.token_bytes for place in (own.start, number, number + 1, own.stop))
        path = self._shards[shard]
        try:
            if "://" in path:
                with epath.Path(path).open("rb") as file:
                    file.seek(first - begin)
                    data = np.frombuffer(file.read(last - first), np.uint8)
                if len(data) != last - first:
                    raise OSError(f"it holds {first - begin + len(data)} of {end - begin} bytes")
            else:
                mapped = _mapped(path, stamp(path))
                if len(mapped) != end - begin:
                    raise OSError(f"it holds {len(mapped)} of {end - begin} bytes")
                data = mapped[first - begin : last - begin]
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is damaged: {one_line(error)}; {AGAIN}") from error
        return data


@lru_cache(maxsize=256)
def _mapped(path: str, version: Stamp) -> np.ndarray:
    return np.asarray(np.memmap(path, np.uint8, "r"))  # slices of a memmap are slow to make


def _layouts(path: epath.Path) -> list[np.ndarray]:
    """Places [tokens, 4] of each."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as found:
            return np.split(found["places"], np.cumsum(found["tokens"])[:-1])
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is damaged: {one_line(error)}; {AGAIN}") from error


def _array(path: epath.Path) -> np.ndarray:
    try:
        in_bucket = "://" in os.fspath(path)
        held = io.BytesIO(path.read_bytes()) if in_bucket else path
        return np.asarray(np.load(held, mmap_mode=None if in_bucket else "r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path} cannot be read: {one_line(error)}; {AGAIN}") from error
