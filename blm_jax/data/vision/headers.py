"""What the headers of pictures and videos say: sizes, known before anything is decoded.

A file of some hundred bytes can promise a picture of gigabytes, and a setting in a record can ask for one.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import av
import av.error
from PIL import Image

from blm_jax.data.files import one_line
from blm_jax.data.vision.pixels import PixelConfig, check_positive, fit_size
from blm_jax.data.vision.video import frame_size, read_timeline, sample_count
from blm_jax.errors import RequestError

LARGEST = 2**26  # pixels of a picture or frame
# Formats that PIL decodes itself; it would start other programs for some.
PICTURES = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# How video files begin. FFmpeg also knows text files that name other files to open, which no record may.
VIDEOS = (
    (4, (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")),  # MP4, QuickTime
    (0, (b"\x1aE\xdf\xa3",)),  # Matroska, WebM
    (8, (b"AVI ",)),
    (0, (b"\x00\x00\x01\xba", b"OggS", b"FLV\x01", b"GIF8", b"0&\xb2u")),  # MPEG, Ogg, Flash, GIF, Windows Media
    (188, (b"G",)),  # MPEG transport stream, in packets of 188 bytes
)


def picture_tokens(data: bytes, settings: Mapping[str, Any], config: PixelConfig) -> int:
    """Visual tokens that a picture will be."""
    check_positive("picture", settings)
    config = replace(config, **settings)
    height, width = fit_size(*picture_size(data), config.factor, config.min_pixels, config.max_pixels)
    return height * width // config.factor**2


def video_tokens(source: bytes | Sequence[bytes], settings: Mapping[str, Any], config: PixelConfig) -> int:
    """Visual tokens that a video, or frames, will be."""
    check_positive("video", settings)
    video = replace(config.video, **{name: value for name, value in settings.items() if name != "frames"})
    if isinstance(source, bytes):
        check_video(source)
        try:
            with av.open(io.BytesIO(source), mode="r") as container:
                timeline = read_timeline(container)
                codec = container.streams.video[0].codec_context
                height, width = codec.height, codec.width
                _check_pixels(height, width, "video")
                count = sample_count(timeline, video, settings.get("frames"), config.temporal_patch)
        except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
            raise RequestError(f"the video cannot be read: {one_line(error)}") from error
    else:
        height, width = picture_size(source[0])
        for frame in source[1:]:
            picture_size(frame)
        count = len(source)
    height, width = frame_size(height, width, count, config, video)
    return -(-count // config.temporal_patch) * (height * width // config.factor**2)


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width, before the picture is turned upright."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data), formats=PICTURES)
    except Image.DecompressionBombError:
        raise RequestError(f"a picture has more than {LARGEST} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise RequestError(f"a picture is in no format known here: give {', '.join(PICTURES)}") from None
    except Exception as error:  # PIL's readers raise nearly everything on broken files
        raise RequestError(f"a picture cannot be read: {one_line(error)}") from error
    _check_pixels(image.height, image.width, "picture")
    return image.height, image.width


def check_video(data: bytes) -> None:
    if not any(data[place : place + len(mark)] == mark for place, marks in VIDEOS for mark in marks):
        raise RequestError("a video is in no format known here: give MP4, WebM, Matroska, AVI or the like")


def _check_pixels(height: int, width: int, kind: str) -> None:
    if height * width > LARGEST:
        raise RequestError(f"a {kind} of {width}x{height} has more than {LARGEST} pixels: make it smaller")
