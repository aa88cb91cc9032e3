"""Frames of a video file by their timestamps: the very ones, never their neighbours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
from av.container import InputContainer
from etils import epath

from blm_jax.data.demos.episodes import Stamp, stamp
from blm_jax.data.vision.video import Timeline, decode, read_timeline

TOLERANCE = 1e-4  # seconds between the time asked for and the frame's, as LeRobot has it


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[InputContainer]:
    if "://" not in os.fspath(path):
        with av.open(os.fspath(path), mode="r") as container:
            yield container
        return
    with path.open("rb") as file, av.open(file, mode="r") as container:
        yield container


def timeline(path: epath.Path) -> Timeline:
    """When each frame is shown. A file is read once in a while, not once a window."""
    return _timeline(os.fspath(path), stamp(path))


@lru_cache(maxsize=256)
def _timeline(path: str, version: Stamp) -> Timeline:
    with opened(epath.Path(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its frames are coded in a way that is not known")
        entries = stream.index_entries
        if stream.codec_context.has_b_frames or not entries or stream.time_base is None:
            return _checked(read_timeline(container), stream.frames)  # frames are not shown in the order of the index
        size = version[1] if version else epath.Path(path).stat().length
        if max(entry.pos + entry.size for entry in entries) > size:
            raise ValueError("it breaks off before its last frame")
        times = np.array([entry.timestamp for entry in entries], np.int64)
        keys = np.array([entry.timestamp for entry in entries if entry.is_keyframe], np.int64)
    tick = Fraction(stream.time_base)
    return Timeline(times, keys, tick, int(times[-1] - times[0]) * tick, steady=False)


def _checked(found: Timeline, promised: int) -> Timeline:
    if promised and len(found.times) < promised:
        raise ValueError(f"it breaks off after {len(found.times)} of {promised} frames")
    return found


def find(found: Timeline, seconds: np.ndarray) -> np.ndarray:
    """The frames [n] int64, in ticks, that are shown at these moments [n]. A moment without a frame is a ValueError."""
    shown = found.times * float(found.tick)
    after = np.clip(np.searchsorted(shown, seconds), 1, max(len(shown) - 1, 1))
    nearest = np.where(np.abs(shown[after - 1] - seconds) <= np.abs(shown[after % len(shown)] - seconds), after - 1, after % len(shown))
    off = ~(np.abs(shown[nearest] - seconds) <= TOLERANCE)  # this way round for NaN
    if off.any():
        raise ValueError(f"it has no frame at {seconds[np.argmax(off)]:.4f} s; its frames go from {shown[0]:.4f} to {shown[-1]:.4f} s")
    return found.times[nearest]


def read_frames(path: epath.Path, seconds: np.ndarray) -> np.ndarray:
    """[n, height, width, 3] uint8 at these moments [n], in any order. Whatever is wrong with the file is a ValueError or an OSError."""
    found = timeline(path)
    times, order = np.unique(find(found, seconds), return_inverse=True)
    with opened(path) as container:
        frames = decode(container, found, times, np.asarray)
    return np.stack(frames)[order]
