"""Writes LeRobot v3.0. Loaded with lerobot 0.4.4."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.robots import IMAGES, Dimension, Robot
from blm_jax.data.demos.running import Running
from blm_jax.errors import RequestError

DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK = 1000  # files a directory
FRAMES = 20_000  # after which an episode begins another file
# Every other frame is a key frame, as in lerobot's own sets: any frame is near one. Frames stand in the order in which they are shown.
ENCODER = {"crf": "18", "g": "2", "bf": "0", "threads": "1"}
STATE, ACTION = "observation.state", "action"
COUNTERS = ("frame_index", "episode_index", "index", "task_index")


class LeRobotWriter:
    """Writes into an empty directory."""

    def __init__(self, directory: epath.Path, robot: Robot):
        if robot.hz != int(robot.hz):
            raise RequestError(f"robot {robot.name} has {robot.hz} steps a second, and LeRobot's sets a whole number: record as RLDS")
        for camera in robot.cameras:
            if camera.height % 2 or camera.width % 2:
                raise RequestError(f"camera {camera.name} is {camera.height}x{camera.width}, and videos have even sizes: record as RLDS")
        self._directory, self._robot, self._fps = directory, robot, int(robot.hz)
        self._cameras = {camera.name: IMAGES + camera.name for camera in robot.cameras}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0  # of all files
        self._file, self._in_file = -1, FRAMES  # frames of the file that is written
        self._data: Any = None
        self._videos: dict[str, Any] = {}
        self._numbers = {STATE: Running(len(robot.state)), ACTION: Running(len(robot.action))}

    def add(self, recording: Recording) -> None:
        if self._in_file >= FRAMES:
            self._next_file()
        steps, number = len(recording.action), len(self._episodes)
        task = self._tasks.setdefault(recording.instruction, len(self._tasks))
        values = {STATE: recording.state[:steps].astype(np.float32), ACTION: recording.action.astype(np.float32)}
        counters = (np.arange(steps), np.full(steps, number), np.arange(steps) + self._frames, np.full(steps, task))
        columns = {name: pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), found.shape[1]) for name, found in values.items()}
        columns["timestamp"] = pa.array((np.arange(steps) / self._fps).astype(np.float32))
        columns |= {name: pa.array(found, pa.int64()) for name, found in zip(COUNTERS, counters, strict=True)}
        table = pa.table(columns)
        if self._data is None:
            self._data = pq.ParquetWriter(self._made(DATA), table.schema)
        self._data.write_table(table)  # a row group an episode
        for name, found in values.items():
            self._numbers[name].add(found)
        for camera, video in self._videos.items():
            for i, picture in enumerate(recording.images[camera][:steps]):
                video.write(picture, self._in_file + i)
        self._episodes.append(self._described(number, steps, recording.instruction))
        self._frames += steps
        self._in_file += steps

    def _described(self, number: int, steps: int, instruction: str) -> dict[str, Any]:
        chunk, file = divmod(self._file, CHUNK)
        row: dict[str, Any] = {"episode_index": number, "tasks": [instruction], "length": steps}
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + steps}
        for key in self._cameras.values():
            begin, end = (frame / self._fps for frame in (self._in_file, self._in_file + steps))
            times = {"chunk_index": chunk, "file_index": file, "from_timestamp": begin, "to_timestamp": end}
            row |= {f"videos/{key}/{name}": value for name, value in times.items()}
        return row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}

    def _made(self, template: str, **names: str) -> str:
        chunk, file = divmod(self._file, CHUNK)
        path = self._directory / template.format(chunk_index=chunk, file_index=file, **names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def _next_file(self) -> None:
        self._close_files()
        self._file, self._in_file, self._data = self._file + 1, 0, None
        self._videos = {
            camera.name: _Video(self._made(VIDEO, video_key=self._cameras[camera.name]), camera.height, camera.width, self._fps)
            for camera in self._robot.cameras
        }

    def _close_files(self) -> None:
        if self._data is not None:
            self._data.close()
        for video in self._videos.values():
            video.close()

    def close(self) -> None:
        self._close_files()
        meta = self._directory / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), str(meta / "episodes" / "chunk-000" / "file-000.parquet"))
        pq.write_table(_task_table(list(self._tasks)), str(meta / "tasks.parquet"))
        (meta / "stats.json").write_text(json.dumps({name: _stats(found) for name, found in self._numbers.items()}, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))

    def _info(self) -> dict[str, Any]:
        features: dict[str, Any] = {STATE: _numbers(self._robot.state), ACTION: _numbers(self._robot.action)}
        for camera in self._robot.cameras:
            shape = [camera.height, camera.width, 3]
            about = {
                "video.height": camera.height,
                "video.width": camera.width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": self._fps,
                "video.channels": 3,
                "has_audio": False,
            }
            names = ["height", "width", "channels"]
            features[self._cameras[camera.name]] = {"dtype": "video", "shape": shape, "names": names, "info": about}
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in COUNTERS}
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot.name,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA,
            "video_path": VIDEO,
            "features": features,
        }


class _Video:
    def __init__(self, path: str, height: int, width: int, fps: int):
        self._container = av.open(path, "w")
        self._stream: Any = self._container.add_stream("libx264", rate=fps, options=ENCODER)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._tick = Fraction(1, fps)

    def write(self, picture: np.ndarray, number: int) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base = number, self._tick
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


def _numbers(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [len(dimensions)], "names": [dimension.name for dimension in dimensions]}


def _stats(found: Running) -> dict[str, Any]:
    numbers = {"min": found.low, "max": found.high, "mean": found.mean, "std": np.sqrt(found.squares / found.count)}
    shares = (0.01, 0.1, 0.5, 0.9, 0.99)
    numbers |= {f"q{round(100 * share):02d}": values for share, values in zip(shares, found.quantiles(shares), strict=True)}
    return {name: values.tolist() for name, values in numbers.items()} | {"count": [found.count]}


def _task_table(tasks: list[str]) -> pa.Table:
    """lerobot finds a task's text in the index that pandas makes of this column."""
    index = "__index_level_0__"
    columns = [
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
    ]
    heads = [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}]
    described = {"index_columns": [index], "column_indexes": heads, "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(described)})
