"""From pixels to patches: sizes, normalisation, and the order in which the vision tower reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from blm_jax.config import VisionConfig
from blm_jax.data.files import read_json
from blm_jax.errors import RequestError

BICUBIC = 3  # PIL's number, as preprocessor_config.json writes it
MAX_ASPECT = 200  # of the longer side to the shorter


@dataclass(frozen=True)
class VideoConfig:
    """How a video is sampled. The defaults are those of Qwen2.5-VL's own tools."""

    fps: float = 2.0  # frames a second to take
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 28 * 28  # of a frame
    max_pixels: int = 768 * 28 * 28  # of a frame
    total_pixels: int = int(128_000 * 28 * 28 * 0.9)  # of all frames of a video, two counted as one as they share patches


@dataclass(frozen=True)
class PixelConfig:
    """How pictures and frames become patches: the model directory's preprocessor_config.json."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale: float = 1 / 255
    resample: int = BICUBIC
    video: VideoConfig = VideoConfig()

    @property
    def factor(self) -> int:
        """Sides of a resized picture are multiples of this: it is cut into whole visual tokens."""
        return self.patch * self.merge

    def check(self, vision: VisionConfig) -> None:
        for name in ("patch", "temporal_patch", "merge"):
            if getattr(self, name) != getattr(vision, name):
                raise RequestError(
                    f"preprocessor_config.json has a {name} of {getattr(self, name)}, config.json of {getattr(vision, name)}: "
                    "they belong to different models"
                )


def read_pixel_config(directory: epath.PathLike) -> PixelConfig:
    """The settings of a model directory, from the newer processor_config.json or the older preprocessor_config.json."""
    directory = epath.Path(directory)
    nested = read_settings(directory, "processor_config.json")
    picture = nested.section("image_processor") or read_settings(directory, "preprocessor_config.json")
    if not picture:
        raise RequestError(f"{directory} has no preprocessor_config.json: pictures cannot be prepared as the model expects them")
    # The limits for pictures are no limits for the frames of a video, which have files of their own or the defaults.
    video = nested.section("video_processor") or read_settings(directory, "video_preprocessor_config.json")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if picture.values.get(name) is False:
            raise RequestError(f"{directory}: the preprocessor sets {name} to false, which is not supported")
    default = PixelConfig()
    low, high = pixel_limits(picture, default.min_pixels, default.max_pixels)
    config = PixelConfig(
        min_pixels=low,
        max_pixels=high,
        patch=picture.whole("patch_size", default.patch),
        temporal_patch=picture.whole("temporal_patch_size", default.temporal_patch),
        merge=picture.whole("merge_size", default.merge),
        mean=picture.three("image_mean", default.mean),
        std=picture.three("image_std", default.std, above=0),
        rescale=picture.number("rescale_factor", default.rescale),
        resample=picture.filter("resample", default.resample),
    )
    return replace(config, video=video_config(video, config))


@dataclass(frozen=True)
class Settings:
    """The values of a preprocessor's file, checked as they are read. What is null counts as absent."""

    values: Mapping[str, Any]
    where: str

    def __bool__(self) -> bool:
        return bool(self.values)

    def get(self, name: str, default: Any, holds: Callable[[Any], bool], wanted: str) -> Any:
        value = self.values.get(name)
        if value is not None and not holds(value):
            raise RequestError(f"{self.where}: {name} is {value!r}, but {wanted}")
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        return self.get(name, default, lambda value: is_number(value, above=0), "a number above 0 is needed")

    def whole(self, name: str, default: int) -> int:
        def holds(value: Any) -> bool:
            return is_number(value, above=0) and value == int(value)

        return int(self.get(name, default, holds, "a whole number above 0 is needed"))

    def three(self, name: str, default: tuple[float, ...], above: float = -math.inf) -> tuple[float, ...]:
        def holds(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 3 and all(is_number(item, above) for item in value)

        wanted = "three numbers" if above == -math.inf else f"three numbers above {above:g}"
        return tuple(self.get(name, default, holds, f"{wanted} are needed"))

    def filter(self, name: str, default: int) -> int:
        return self.get(name, default, lambda value: type(value) is int and 0 <= value <= 5, "a filter of PIL, 0 to 5, is needed")

    def section(self, name: str) -> Settings:
        return Settings(self.get(name, {}, lambda value: isinstance(value, dict), "an object is needed"), f"{self.where}: {name}")


def is_number(value: Any, above: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf


def read_settings(directory: epath.Path, name: str) -> Settings:
    path = directory / name
    return Settings(read_json(path) if path.exists() else {}, str(path))


def pixel_limits(settings: Settings, low: int, high: int) -> tuple[int, int]:
    """Newer files write min_pixels and max_pixels as edges of `size`, which hold pixels none the less."""
    size = settings.section("size")
    low = settings.whole("min_pixels", size.whole("shortest_edge", size.whole("min_pixels", low)))
    high = settings.whole("max_pixels", size.whole("longest_edge", size.whole("max_pixels", high)))
    return low, high


def video_config(settings: Settings, pixels: PixelConfig) -> VideoConfig:
    default = VideoConfig()
    low, high = pixel_limits(settings, default.min_pixels, default.max_pixels)
    return VideoConfig(
        fps=settings.number("fps", default.fps),
        min_frames=settings.whole("min_frames", default.min_frames),
        max_frames=settings.whole("max_frames", default.max_frames),
        min_pixels=low,
        max_pixels=high,
        total_pixels=int(settings.whole("max_video_tokens", 128_000) * pixels.factor**2 * 0.9),
    )


def check_positive(kind: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if not is_number(value, above=0):
            raise RequestError(f"{name} of a {kind} must be a number above 0, not {value!r}")


def fit_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a picture is resized to: multiples of `factor`, within the limits, near to its own aspect.

    The result can pass a limit by rounding, as in the reference, to whose rounding weights are trained.
    """
    if min(height, width) < 1:
        raise RequestError(f"a picture of {width}x{height} pixels has no content")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise RequestError(
            f"a picture of {width}x{height} pixels is too narrow: one side may be {MAX_ASPECT} times the other; crop it or cut it in parts"
        )
    rows, columns = round(height / factor), round(width / factor)  # round half to even
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def cut_patches(frames: np.ndarray, config: PixelConfig) -> np.ndarray:
    """Patches [n, channels * temporal_patch * patch * patch] uint8 of resized frames [t, height, width, 3] uint8.

    Patches come by temporal patch, then visual token in raster order, then the merge x merge patches of that token. A single
    frame fills its temporal patch with copies of itself.
    """
    merge, patch = config.merge, config.patch
    time, height, width, channels = frames.shape
    depth, copies = (1, config.temporal_patch) if time == 1 else (config.temporal_patch, 1)
    blocks = frames.reshape(time // depth, depth, height // (merge * patch), merge, patch, width // (merge * patch), merge, patch, channels)
    # [time, rows, columns, merge, merge, channels, depth, patch, patch]
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels, 1, depth * patch * patch)
    return np.repeat(blocks, copies, axis=2).reshape(len(blocks), -1)


def normalise(patches: np.ndarray, config: PixelConfig) -> np.ndarray:
    """Patches [n, values] uint8 -> float32, exactly as the reference has them."""
    table = value_table(config.rescale, config.mean, config.std)
    by_channel = patches.reshape(len(patches), len(table), -1)
    values = np.empty(by_channel.shape, np.float32)
    for channel, meaning in enumerate(table):
        values[:, channel] = meaning.take(by_channel[:, channel], mode="clip")  # "clip" spares the check of bounds
    return values.reshape(patches.shape)


def levels_of(config: PixelConfig) -> tuple[tuple[float, float], ...]:
    """Scale and offset by channel that normalise bytes on a device, to the last bit or two."""
    return tuple((config.rescale / std, -mean / std) for mean, std in zip(config.mean, config.std, strict=True))


@functools.cache
def value_table(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """What each of the 256 values of a channel becomes, [3, 256]: rounded step by step as the reference does."""
    values = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    return (values[None] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
