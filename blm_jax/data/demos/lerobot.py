"""Demonstrations in LeRobot's formats: v2.0 and v2.1, a Parquet file and a video a camera for each episode, and v3.0, many episodes a file.

Tested with sets that lerobot 0.3.3 (v2.1) and 0.4.4 (v3.0) wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import string
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Any

import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from PIL import Image

from blm_jax.data.demos import frames as video
from blm_jax.data.demos.episodes import TASK, BadEpisode, Rows, Source, Stamp, marks, stamp
from blm_jax.data.files import one_line, read_json
from blm_jax.errors import RequestError

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
CODE = re.compile(r"(0?\d{1,2})?d?")  # of a number in a template, such as 03d
# What a broken file makes pyarrow, FFmpeg or Pillow raise.
BROKEN = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, SyntaxError),
    *(pa.ArrowException, av.error.FFmpegError, Image.DecompressionBombError),
)
KEPT = 2**29  # bytes of decoded rows that a process keeps


@dataclass(frozen=True)
class _Episode:
    """Where an episode lies."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: str
    videos: dict[str, tuple[str, float]]  # by camera: the file, and the second at which the episode begins


def is_lerobot(path: epath.Path) -> bool:
    return (path / INFO).exists()


class LeRobot(Source):
    """A set on disk. See `episodes.Source`."""

    def __init__(self, path: epath.Path):
        self.path = path
        self._info = path / INFO
        info = read_json(self._info)
        self._version = _get(info, "codebase_version", str, self._info)
        if self._version not in VERSIONS:
            raise RequestError(f"{path} is of LeRobot's format {self._version}; {', '.join(VERSIONS)} are read")
        self._fps = float(_get(info, "fps", float, self._info))
        if not 0 < self._fps < math.inf:
            raise RequestError(f"{self._info}: fps is {self._fps}: it must be above 0")
        self.hz = self._fps
        self._read_features(_get(info, "features", dict, self._info))
        self._episodes = self._v3(info) if self._version == "v3.0" else self._v2(info)
        self.count = len(self._episodes)
        promised = _get(info, "total_episodes", int, self._info)
        if promised != self.count:
            raise RequestError(f"{self._info} promises {promised} episodes, but {self.count} are listed in {path / 'meta'}")
        self._described = json.dumps(info, sort_keys=True)

    @cached_property
    def identity(self) -> str:
        listed = [[one.index, one.length, one.tasks, one.data, sorted(one.videos.items())] for one in self._episodes]
        names = {name for one in self._episodes for name in (one.data, *(file for file, _ in one.videos.values()))}
        # Statistics tell sets apart that differ in their numbers alone, in the middle of large files.
        kept = [self.path / "meta" / name for name in ("stats.json", "episodes_stats.jsonl")]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in kept if file.exists()]
        found = [self._described, sorted(self._tasks.items()), listed, digests, marks({name: self.path / name for name in names})]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def _read_features(self, features: dict[str, Any]) -> None:
        columns: dict[str, int] = {}
        cameras: dict[str, tuple[int | None, int | None]] = {}
        self._videos: set[str] = set()
        texts = [TASK]
        for name, feature in features.items():
            shape = feature.get("shape", [1]) if isinstance(feature, dict) else None
            if not isinstance(feature, dict) or not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise RequestError(f"{self._info}: feature {name} has no dtype and shape as LeRobot writes them")
            kind = feature.get("dtype")
            if kind in ("video", "image"):
                cameras[name] = _size(shape, feature.get("names"))
                self._videos |= {name} if kind == "video" else set()
            elif kind == "string":
                texts.append(name)
            else:
                columns[name] = math.prod(shape)
        self.columns, self.cameras, self.texts = columns, cameras, tuple(texts)

    # --- where episodes lie ------------------------------------------------------------------------------------------------

    def _v2(self, info: dict[str, Any]) -> tuple[_Episode, ...]:
        data = self._template(info, "data_path", {"episode_chunk", "episode_index"})
        clip = self._template(info, "video_path", {"episode_chunk", "episode_index", "video_key"}) if self._videos else ""
        size = _get(info, "chunks_size", int, self._info)
        if size < 1:
            raise RequestError(f"{self._info}: chunks_size is {size}: it must be above 0")
        self._tasks = {}
        for line, number in self._lines("meta/tasks.jsonl"):
            self._tasks[_whole(line, "task_index", number)] = _get(line, "task", str, number)
        episodes = []
        for line, number in self._lines("meta/episodes.jsonl"):
            index, length = (_whole(line, key, number) for key in ("episode_index", "length"))
            place = {"episode_chunk": index // size, "episode_index": index}
            videos = {camera: (self._file(clip, video_key=camera, **place), 0.0) for camera in self._videos}
            episodes.append(_Episode(index, length, _texts(line.get("tasks")), self._file(data, **place), videos))
        return self._in_order(episodes)

    def _lines(self, name: str) -> list[tuple[dict[str, Any], str]]:
        """The objects of a JSONL file, and where each stands."""
        path = self.path / name
        try:
            found = [(json.loads(line), f"{path}:{i}") for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
        except (ValueError, OSError, RecursionError) as error:
            raise RequestError(f"{path} cannot be read as JSON lines: {one_line(error)}") from error
        for line, where in found:
            if not isinstance(line, dict):
                raise RequestError(f"{where} must hold a JSON object")
        return found

    def _v3(self, info: dict[str, Any]) -> tuple[_Episode, ...]:
        data = self._template(info, "data_path", {"chunk_index", "file_index"})
        clip = self._template(info, "video_path", {"chunk_index", "file_index", "video_key"}) if self._videos else ""
        self._tasks = self._read_tasks(self.path / "meta" / "tasks.parquet")
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise RequestError(f"{self.path / 'meta' / 'episodes'} holds no Parquet file: the set has no list of its episodes")
        fields = ("chunk_index", "file_index", "from_timestamp")
        names = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
        names += [f"videos/{camera}/{field}" for camera in self._videos for field in fields]
        episodes = []
        for file in files:
            for row in _read_small(file, names):
                place = {key: _whole(row, f"data/{key}", file) for key in fields[:2]}
                index, length = (_whole(row, key, file) for key in ("episode_index", "length"))
                videos = {}
                for camera in self._videos:
                    there = {key: _whole(row, f"videos/{camera}/{key}", file) for key in fields[:2]}
                    begin = _get(row, f"videos/{camera}/from_timestamp", float, file)
                    videos[camera] = self._file(clip, video_key=camera, **there), float(begin)
                episodes.append(_Episode(index, length, _texts(row.get("tasks")), self._file(data, **place), videos))
        return self._in_order(episodes)

    def _read_tasks(self, file: epath.Path) -> dict[int, str]:
        tasks = {}
        for row in _read_small(file):
            # pandas keeps the text as the index of its rows, which has a name in later releases of lerobot.
            text = next((row[name] for name in ("task", "__index_level_0__") if name in row), None)
            if not isinstance(text, str):
                raise RequestError(f"{file} has no column of the tasks' texts")
            tasks[_whole(row, "task_index", file)] = text
        return tasks

    def _in_order(self, episodes: list[_Episode]) -> tuple[_Episode, ...]:
        episodes = sorted(episodes, key=lambda episode: episode.index)
        for one, other in itertools.pairwise(episodes):
            if one.index == other.index:
                raise RequestError(f"{self.path} lists its episode {one.index} twice")
        return tuple(episodes)

    def _template(self, info: dict[str, Any], key: str, known: set[str]) -> str:
        """A template of paths that names numbers and cameras, and nothing else."""
        template = _get(info, key, str, self._info)
        try:
            parts = [(name, code, conversion) for _, name, code, conversion in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise RequestError(f"{self._info}: {key} {template!r} is no template: {one_line(error)}") from error
        for name, code, conversion in parts:
            fits = code == "" if name == "video_key" else CODE.fullmatch(code or "")
            if name not in known or conversion or not fits:
                raise RequestError(f"{self._info}: {key} {template!r} must be made of {', '.join(sorted(known))}")
        return template

    def _file(self, template: str, **place: Any) -> str:
        name = template.format(**place)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or "://" in name:
            raise RequestError(f"{self._info} leads to {name!r}, out of the set: paths must stay within it")
        return name

    # --- reading -----------------------------------------------------------------------------------------------------------

    def read(self, episode: int, columns: Sequence[str], instruction: str) -> Rows:
        label = "task_index" if instruction == TASK else instruction
        values = self._read(episode, [*columns, label])
        for name in columns:
            if values[name].dtype == object:
                raise BadEpisode(f"column {name} holds no numbers")
        texts = self._instructions(episode, values[label]) if instruction == TASK else [str(text) for text in values[label]]
        return Rows({name: values[name] for name in columns}, texts, self._episodes[episode].length)

    def _instructions(self, episode: int, tasks: np.ndarray) -> list[str]:
        unknown = [task for task in np.unique(tasks) if task not in self._tasks]
        if unknown:
            raise BadEpisode(f"task {unknown[0]} is not in the list of tasks")
        return [self._tasks[int(task)] for task in tasks.reshape(-1)]

    def _read(self, episode: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of an episode's steps, in their order."""
        found = self._episodes[episode]
        if found.length == 0:
            raise BadEpisode("it has no steps")
        path = self.path / found.data
        with _naming(found.data):
            version = stamp(path)
            first, count = _places(os.fspath(path), version).get(found.index, (0, 0))
            if count != found.length:
                raise BadEpisode(f"{found.data} holds {count} of its {found.length} steps")
            return _rows(os.fspath(path), version, first, count, tuple(dict.fromkeys(columns)))

    def _seconds(self, episode: int) -> np.ndarray:
        """When each step's frame is shown in an episode's videos, but for where the episode begins in them."""
        if "timestamp" not in self.columns:
            return np.arange(self._episodes[episode].length) / self._fps
        return self._read(episode, ["timestamp"])["timestamp"].reshape(-1).astype(np.float64)

    def check_frames(self, episode: int, camera: str) -> None:
        if camera not in self._videos:
            self._pictures(episode, camera)
            return
        file, begin = self._episodes[episode].videos[camera]
        seconds = self._seconds(episode) + begin
        with _naming(file):
            video.find(video.timeline(self.path / file), seconds)

    def frames(self, episode: int, camera: str, steps: Sequence[int]) -> np.ndarray:
        if camera not in self._videos:
            pictures = self._pictures(episode, camera)
            with _naming(f"a picture of {camera}"):
                return np.stack([np.asarray(Image.open(io.BytesIO(pictures[step])).convert("RGB")) for step in steps])
        file, begin = self._episodes[episode].videos[camera]
        seconds = self._seconds(episode)[np.asarray(steps, np.int64)] + begin
        with _naming(file):
            return video.read_frames(self.path / file, seconds)

    def _pictures(self, episode: int, camera: str) -> list[bytes]:
        """Encoded, one a step."""
        pictures = self._read(episode, [camera])[camera].tolist()
        if not all(isinstance(picture, dict) and isinstance(picture.get("bytes"), bytes) for picture in pictures):
            raise BadEpisode(f"{self._episodes[episode].data} lacks pictures of {camera}")
        return [picture["bytes"] for picture in pictures]


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors of reading a file, as what is wrong with the episode."""
    try:
        yield
    except FileNotFoundError:
        raise BadEpisode(f"{what} is missing") from None
    except BROKEN as error:
        raise BadEpisode(f"{what} cannot be read: {one_line(error)}") from error


# --- Parquet -----------------------------------------------------------------------------------------------------------------


def _read_small(file: epath.Path, names: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file of metadata."""
    try:
        with file.open("rb") as stream, pq.ParquetFile(stream) as parquet:
            missing = [name for name in names or () if name not in parquet.schema_arrow.names]
            if missing:
                raise RequestError(f"{file} has no column {missing[0]}")
            return parquet.read(columns=names).to_pylist()
    except FileNotFoundError:
        raise RequestError(f"{file} does not exist") from None
    except BROKEN as error:
        raise RequestError(f"{file} cannot be read as Parquet: {one_line(error)}") from error


@lru_cache(maxsize=1024)
def _places(path: str, version: Stamp) -> dict[int, tuple[int, int]]:
    """The first row and the number of rows of each episode in a file."""
    with epath.Path(path).open("rb") as stream, pq.ParquetFile(stream) as parquet:
        column = parquet.read(columns=["episode_index"])["episode_index"]
    if column.null_count or not pa.types.is_integer(column.type):
        raise ValueError("its episode_index is not whole numbers")
    episodes = column.to_numpy()
    starts = np.flatnonzero(np.diff(episodes, prepend=episodes[:1] - 1))
    counts = np.diff(starts, append=len(episodes))
    found = {int(episodes[start]): (int(start), int(count)) for start, count in zip(starts, counts, strict=True)}
    if len(found) < len(starts):
        raise ValueError("an episode's steps do not follow each other")
    return found


class _Kept:
    """Decoded columns of row groups, the ones used last. Files may hold all their rows in one group."""

    def __init__(self) -> None:
        self.held: OrderedDict[Any, tuple[np.ndarray, int]] = OrderedDict()  # with their sizes
        self.size = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> np.ndarray | None:
        with self._lock:
            if key not in self.held:
                return None
            self.held.move_to_end(key)
            return self.held[key][0]

    def put(self, key: Any, values: np.ndarray) -> None:
        size = _bytes(values)
        with self._lock:
            self.size += size - self.held.pop(key, (values, 0))[1]
            self.held[key] = values, size
            while self.size > KEPT and len(self.held) > 1:
                self.size -= self.held.popitem(last=False)[1][1]


def _bytes(values: np.ndarray) -> int:
    """What they take in memory; of objects, with the texts and pictures that an array only points to."""
    if values.dtype != object:
        return values.nbytes
    parts = (part for value in values for part in (value, *(value.values() if isinstance(value, dict) else ())))
    return values.nbytes + sum(map(sys.getsizeof, parts))


_kept = _Kept()


@lru_cache(maxsize=1024)
def _groups(path: str, version: Stamp) -> tuple[int, ...]:
    """The first row of each row group, and the number of rows."""
    with epath.Path(path).open("rb") as stream, pq.ParquetFile(stream) as parquet:
        return (0, *np.cumsum([parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]).tolist())


def _rows(path: str, version: Stamp, first: int, count: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """[count, elements], or [count] of what is one thing a row."""
    starts = _groups(path, version)
    low, high = (int(np.searchsorted(starts, row, side="right")) - 1 for row in (first, first + count - 1))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for group in range(low, high + 1):
        held = {name: _kept.get((path, version, group, name)) for name in columns}
        absent = [name for name, values in held.items() if values is None]
        for name, values in (_decode(path, group, absent) if absent else {}).items():
            _kept.put((path, version, group, name), values)
            held[name] = values
        cut = slice(max(first - starts[group], 0), first + count - starts[group])
        for name, values in held.items():
            assert values is not None
            parts[name].append(values[cut])
    return {name: np.concatenate(part) for name, part in parts.items()}


def _decode(path: str, group: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
    with epath.Path(path).open("rb") as stream, pq.ParquetFile(stream) as parquet:
        missing = [name for name in columns if name not in parquet.schema_arrow.names]
        if missing:
            raise ValueError(f"it has no column {missing[0]}")
        table = parquet.read_row_group(group, columns=list(columns))
    return {name: _numpy(table[name].combine_chunks(), name) for name in columns}


def _numpy(array: Any, name: str) -> np.ndarray:
    """Numbers as they are, nulls as NaN; texts and pictures as objects."""
    rows = len(array)
    while pa.types.is_nested(array.type) and not pa.types.is_struct(array.type):
        inner = array.flatten()
        lengths = [array.type.list_size] if pa.types.is_fixed_size_list(array.type) else np.unique(array.value_lengths())
        if array.null_count or len(lengths) > 1 or (len(array) and len(inner) != len(array) * lengths[0]):
            raise ValueError(f"the rows of its column {name} are of different lengths")
        array = inner
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_struct(kind):
        values = np.empty(len(array), object)
        values[:] = array.to_pylist()
        return values
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"its column {name} holds {kind}, not numbers")
    values = array.to_numpy(zero_copy_only=False)
    values = values.astype(np.float64) if values.dtype == object else values  # whole numbers with nulls
    return values if len(values) == rows else values.reshape(rows, -1)


# --- checks of metadata ----------------------------------------------------------------------------------------------------------


def _get(values: Mapping[str, Any], key: str, kind: type, where: Any) -> Any:
    found = values.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float) if kind is float else kind):
        wanted = {int: "a whole number", float: "a number", str: "text", dict: "an object"}[kind]
        raise RequestError(f"{where}: {key} {'is missing' if found is None else f'is {found!r:.60}'}: it must be {wanted}")
    return found


def _whole(values: Mapping[str, Any], key: str, where: Any) -> int:
    number = _get(values, key, int, where)
    if number < 0:
        raise RequestError(f"{where}: {key} is {number}: it counts from 0")
    return number


def _texts(tasks: Any) -> tuple[str, ...]:
    return tuple(map(str, tasks)) if isinstance(tasks, list) else ()


def _size(shape: list[int], names: Any) -> tuple[int | None, int | None]:
    """Height and width. `names` says which is which; without, channels stand at the end."""
    names = [str(name).removesuffix("s") for name in names] if isinstance(names, list) and len(names) == len(shape) else []
    if "height" in names and "width" in names:
        return shape[names.index("height")], shape[names.index("width")]
    return (shape[0], shape[1]) if len(shape) == 3 and shape[2] in (1, 3) else (None, None)
