"""Pictures changed a little in training, differently each time they are seen, the same whenever a run sees them again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from blm_jax.errors import RequestError


@dataclass(frozen=True)
class AugmentConfig:
    """Crops move what an answer says of places: leave them out where answers name boxes or points."""

    crop: float = 0.0  # the most that is cut of each side's length; what is left is brought back to the picture's size
    brightness: float = 0.0  # factors between 1 - this and 1 + this, and so on
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop", "brightness", "contrast", "saturation"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise RequestError(f"augment.{name} is {value}: it must lie in [0, 1)")

    @property
    def changes(self) -> bool:
        return self != AugmentConfig()


def generator(seed: int, *place: int) -> np.random.Generator:
    """Of the record and the time it is seen, whoever reads it and in whatever order."""
    digest = hashlib.sha256(repr((seed, *map(int, place))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


def augment(pictures: Sequence[np.ndarray], config: AugmentConfig, random: np.random.Generator) -> list[np.ndarray]:
    """Pictures [height, width, 3] uint8 of one observation, or frames of one camera: all are changed alike."""
    keep = 1 - config.crop * random.random()
    place = random.random(2)
    factors = 1 + np.array([config.brightness, config.contrast, config.saturation]) * random.uniform(-1, 1, 3)
    return [_changed(picture, keep, place, factors) for picture in pictures] if config.changes else list(pictures)


def _changed(picture: np.ndarray, keep: float, place: np.ndarray, factors: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    if keep < 1:
        size = np.array(image.size) * keep
        left, top = (np.array(image.size) - size) * place
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + size[0], top + size[1]))
    for kind, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True):
        if factor != 1:
            image = kind(image).enhance(float(factor))
    return np.asarray(image)
