"""Videos: from a file or frames to patches, sampled by time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from etils import epath
from PIL import Image

from blm_jax.data.files import one_line, read_source, source_path
from blm_jax.data.positions import Grid
from blm_jax.data.vision.pictures import Picture, load_image, resize
from blm_jax.data.vision.pixels import PixelConfig, VideoConfig, check_positive, cut_patches, fit_size
from blm_jax.errors import RequestError

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
COMPLETE = 0.9  # of the length that a file promises: rounding and a last frame of unknown length take less


@dataclass(frozen=True)
class Timeline:
    """The frames of a video stream, known without decoding any."""

    times: np.ndarray  # [frames] int64, when each is shown, in ticks
    keys: np.ndarray  # times of the frames at which decoding can begin
    tick: Fraction  # seconds
    seconds: Fraction  # length of the video
    steady: bool  # the frames come at one rate


def prepare_video(source: Any, config: PixelConfig, **settings: Any) -> Picture:
    """Sample, resize and cut a video.

    `source` is a file (path, file: or data: URL, bytes), or frames: a list of pictures, an array [t, height, width, 3], a
    directory of picture files. Frames are taken all, and `fps` is then their rate. Settings replace the fields of
    `config.video`; `frames` asks for a number of frames rather than a rate.
    """
    check_positive("video", settings)
    wanted = settings.pop("frames", None)
    video = replace(config.video, **settings)
    if video.min_frames > video.max_frames or video.min_pixels > video.max_pixels:
        raise RequestError(f"a minimum of a video is above its maximum: {video}")
    if isinstance(source, (list, tuple, np.ndarray)) or is_directory(source):
        given = list_frames(source)
        if wanted not in (None, len(given)):
            raise RequestError(f"the video is given as {len(given)} frames, which are taken all; {wanted} cannot be asked for")
        fit = frame_fitter(len(given), config, video)
        frames, rate = [fit(load_image(frame)) for frame in given], exact(video.fps)
    else:
        frames, rate = read_video(source, config, video, wanted)
    frames += [frames[-1]] * (-len(frames) % config.temporal_patch)  # the last one fills its temporal patch
    patches = cut_patches(np.stack(frames), config)
    height, width = frames[0].shape[:2]
    grid = Grid(len(frames) // config.temporal_patch, height // config.patch, width // config.patch, float(config.temporal_patch / rate))
    return Picture(patches, grid, config)


def frame_fitter(count: int, config: PixelConfig, video: VideoConfig) -> Callable[[Image.Image], np.ndarray]:
    """How each of `count` frames becomes pixels [height, width, 3] of the size they all have."""
    sizes: set[tuple[int, int]] = set()

    def fit(frame: Image.Image) -> np.ndarray:
        sizes.add(frame.size)
        if len(sizes) > 1:
            raise RequestError(f"the frames of a video must be of one size, not {sorted(sizes)}")
        return resize(frame, *frame_size(frame.height, frame.width, count, config, video), config)

    return fit


def frame_size(height: int, width: int, count: int, config: PixelConfig, video: VideoConfig) -> tuple[int, int]:
    """The size that each of `count` frames is resized to.

    As in Qwen2.5-VL's tools, the budget is shared out evenly, but no frame gets less than a little above its minimum.
    """
    share = video.total_pixels * config.temporal_patch // count
    high = max(min(video.max_pixels, share), int(video.min_pixels * 1.05))
    return fit_size(height, width, config.factor, video.min_pixels, high)


def list_frames(source: Any) -> list[Any]:
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise RequestError(f"an array of frames must be [frames, height, width, 3], not {list(source.shape)}")
        frames = list(source)
    elif isinstance(source, (list, tuple)):
        frames = list(source)
    else:
        # By name: 00010.png stands behind 00009.png when names have equal lengths, as frame writers make them.
        files = sorted(source_path(source, "video").iterdir(), key=lambda path: path.name)
        frames = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    if not frames:
        raise RequestError(f"the video has no frames{'' if isinstance(source, (list, tuple, np.ndarray)) else f' in {source}'}")
    return frames


def exact(fps: float) -> Fraction:
    rate = Fraction(fps).limit_denominator(1_000_000)
    if not rate:
        raise RequestError(f"fps of a video is {fps}: it must be at least 0.000001")
    return rate


def is_directory(source: Any) -> bool:
    if isinstance(source, (bytes, bytearray, memoryview)) or (isinstance(source, str) and source.startswith("data:")):
        return False
    return source_path(source, "video").is_dir()


def read_video(source: Any, config: PixelConfig, video: VideoConfig, wanted: int | None) -> tuple[list[np.ndarray], Fraction]:
    """The sampled frames of a video file, resized, and how many of them there are a second."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), "the video"
    elif is_local(source):
        data, name = None, str(source_path(source, "video"))
    else:
        data, name = read_source(source, "video")

    def opened() -> InputContainer:
        return av.open(name if data is None else io.BytesIO(data), mode="r")

    try:
        with opened() as container:
            timeline = read_timeline(container)
            check_complete(container, timeline)
        chosen = choose_frames(timeline, sample_count(timeline, video, wanted, config.temporal_patch))
        with opened() as container:
            frames = decode(container, timeline, timeline.times[chosen], frame_fitter(len(chosen), config, video))
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise RequestError(f"{name} cannot be read as a video: {one_line(error)}") from error
    return frames, len(chosen) / timeline.seconds


def is_local(source: Any) -> bool:
    """FFmpeg reads local files itself, piece by piece; what lies in a bucket is read as a whole."""
    return not (isinstance(source, str) and source.startswith("data:")) and "://" not in str(epath.Path(source_path(source, "video")))


def read_timeline(container: InputContainer) -> Timeline:
    if not container.streams.video:
        raise ValueError("it holds no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("its codec is not known here")
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    timed = sorted((packet.pts, packet.duration or 0, packet.is_keyframe) for packet in packets if packet.pts is not None)
    if not packets or stream.time_base is None:
        raise ValueError("it holds no frames")
    if len(timed) < len(packets):
        raise ValueError("its frames carry no time; put them into a container such as MP4")
    tick = Fraction(stream.time_base)
    times = np.array([time for time, _, _ in timed], np.int64)
    keys = np.array([time for time, _, key in timed if key], np.int64)
    rate = stream.average_rate or stream.guessed_rate
    if rate:
        # Containers round times to ticks; a steady rate shows nevertheless.
        ideal = times[0] + np.arange(len(times)) / float(rate * tick)
        if (np.abs(times - ideal) <= 1).all():
            return Timeline(times, keys, tick, len(times) / Fraction(rate), steady=True)
    last = timed[-1][1] or (times[-1] - times[0]) // max(len(times) - 1, 1) or 1
    return Timeline(times, keys, tick, int(times[-1] - times[0] + last) * tick, steady=False)


def check_complete(container: InputContainer, timeline: Timeline) -> None:
    """A file that was cut off may decode without an error as far as it goes; but most say how long their stream should be."""
    stream = container.streams.video[0]
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))  # of Matroska
    if stream.duration and stream.time_base:
        promised = float(stream.duration * stream.time_base)
    else:
        promised = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) if tag else 0.0
    start = max(0, int(timeline.times[0])) * timeline.tick
    # One frame's time more: how long the last one stays is not always known.
    end = float(start + timeline.seconds * (len(timeline.times) + 1) / len(timeline.times))
    if end < COMPLETE * promised:
        raise ValueError(f"it breaks off at {float(start + timeline.seconds):.2f} of {promised:.2f} s")


def sample_count(timeline: Timeline, video: VideoConfig, wanted: int | None, depth: int) -> int:
    """How many frames to take: a multiple of the temporal patch, unless the video is shorter than one."""
    total = len(timeline.times)
    count = Fraction(wanted) if wanted else timeline.seconds * exact(video.fps)
    if wanted and wanted > total:
        raise RequestError(f"the video has {total} frames, {wanted} are asked for: ask for fewer")
    low, high = (depth, total) if wanted else (video.min_frames, min(video.max_frames, total))
    count = min(max(count, low), high)
    return max(int(count // depth) * depth, min(depth, total))


def choose_frames(timeline: Timeline, count: int) -> np.ndarray:
    """Which frames [count] are shown at `count` evenly spread moments, from the first frame on."""
    total = len(timeline.times)
    if timeline.steady:
        return np.arange(count) * total // count
    step = timeline.seconds / timeline.tick / count
    moments = np.array([int(timeline.times[0]) + int(i * step) for i in range(count)])
    return np.searchsorted(timeline.times, moments, side="right") - 1


def decode(container: InputContainer, timeline: Timeline, times: np.ndarray, fit: Callable[[Image.Image], np.ndarray]) -> list[np.ndarray]:
    """The frames shown at these times, which ascend. Stretches without a wanted frame are skipped where a key frame allows it."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    images: dict[int, np.ndarray] = {}
    for group in split_at_keys(timeline, times):
        start = int(timeline.keys[np.searchsorted(timeline.keys, group[0], side="right") - 1]) if len(timeline.keys) else 0
        container.seek(start, stream=stream, backward=True)
        images |= decode_group(container, stream, {int(time) for time in group}, fit)
    missing = {int(time) for time in times} - set(images)
    if missing:  # a file whose index leads astray
        container.seek(int(timeline.times[0]), stream=stream, backward=True)
        images |= decode_group(container, stream, missing, fit)
    lost = [time for time in times if int(time) not in images]
    if lost:
        raise ValueError(f"the frame at {float(lost[0] * timeline.tick):.3f} s cannot be decoded")
    return [images[int(time)] for time in times]


def split_at_keys(timeline: Timeline, times: np.ndarray) -> list[np.ndarray]:
    """Runs of wanted times that are decoded in one go: a new one starts where a key frame lies between two of them."""
    if len(timeline.keys) == 0:
        return [times]
    key = np.searchsorted(timeline.keys, times, side="right")
    # The next stretch follows at once: decoding on is cheaper than seeking.
    return np.split(times, np.flatnonzero(np.diff(key) > 1) + 1)


def decode_group(
    container: InputContainer, stream: Any, wanted: set[int], fit: Callable[[Image.Image], np.ndarray]
) -> dict[int, np.ndarray]:
    images: dict[int, np.ndarray] = {}
    last = max(wanted)
    for frame in container.decode(stream):
        if frame.pts in wanted:
            images[frame.pts] = fit(upright(frame))
        if len(images) == len(wanted) or (frame.pts is not None and frame.pts > last):
            break
    return images


def upright(frame: av.VideoFrame) -> Image.Image:
    """Phones film lying down and write how to turn the picture."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
