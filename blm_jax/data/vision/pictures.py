"""Pictures: from a file, bytes, a PIL image or an array to patches."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from blm_jax.data.files import one_line, read_source
from blm_jax.data.positions import Grid
from blm_jax.data.vision.pixels import PixelConfig, check_positive, cut_patches, fit_size, normalise
from blm_jax.errors import RequestError


@dataclass(frozen=True)
class Picture:
    """A picture or a video, ready for the vision tower."""

    raw: np.ndarray  # [grid.patches, channels * temporal_patch * patch * patch] uint8; float32 where `config` is none
    grid: Grid
    config: PixelConfig | None = None

    @property
    def patches(self) -> np.ndarray:
        """[grid.patches, values] float32, normalised."""
        return self.raw if self.config is None else normalise(self.raw, self.config)

    def frames(self, *, as_bytes: bool) -> np.ndarray:
        """[grid.frames, patches of a frame, values]."""
        return (self.raw if as_bytes else self.patches).reshape(self.grid.frames, self.grid.rows * self.grid.columns, -1)


def prepare_picture(source: Any, config: PixelConfig, **limits: int) -> Picture:
    """Load, resize and cut a picture.

    `limits`, min_pixels and max_pixels, replace the model's.
    """
    check_positive("picture", limits)
    config = replace(config, **limits)
    image = load_image(source)
    height, width = fit_size(image.height, image.width, config.factor, config.min_pixels, config.max_pixels)
    frame = resize(image, height, width, config)
    patches = cut_patches(frame[None], config)
    return Picture(patches, Grid(1, height // config.patch, width // config.patch), config)


def resize(image: Image.Image, height: int, width: int, config: PixelConfig) -> np.ndarray:
    """[height, width, 3] uint8."""
    return np.asarray(image.resize((width, height), resample=Image.Resampling(config.resample)))


def load_image(source: Any) -> Image.Image:
    """An RGB image of a path (local or in a bucket), a file: or data: URL, bytes, a PIL image or an array.

    As in transformers, files are turned upright and lose their transparency, while a PIL image keeps its orientation and is
    laid on white.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(rgb_array(source))
    data, name = b"", "the picture"
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif not isinstance(source, Image.Image):
        data, name = read_source(source, "picture")
    try:
        if isinstance(source, Image.Image):
            return on_white(source)  # PIL reads the file of an image only now
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except UnidentifiedImageError:
        raise RequestError(f"{name} is no picture in a format known here: give PNG, JPEG, WebP or the like") from None
    except Exception as error:  # PIL's readers raise nearly everything on broken files
        raise RequestError(f"{name} cannot be read as a picture: {one_line(error)}") from error


def rgb_array(array: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 of an array with 1, 3 or 4 channels, first, last or absent."""
    if array.dtype != np.uint8:
        raise RequestError(f"an array of pixels must be uint8, 0 to 255, not {array.dtype}: scale and convert it first")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise RequestError(f"an array of pixels must be [height, width, 3], not {list(array.shape)}")
    if array.shape[-1] == 4:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def on_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
