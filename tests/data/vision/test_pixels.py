"""Pictures against transformers' PIL processor: sizes, values, and every kind of file."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as reference_load
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from blm_jax.config import BackboneConfig
from blm_jax.data.positions import Grid
from blm_jax.data.vision.pictures import load_image, prepare_picture
from blm_jax.data.vision.pixels import PixelConfig, VideoConfig, fit_size, read_pixel_config
from blm_jax.errors import RequestError
from tests.qwen_files import PREPROCESSOR


def random_sizes() -> list[tuple[int, int]]:
    """Fifty sizes of all aspects, the extreme ones included."""
    random = np.random.default_rng(0)
    extreme = [(1, 200), (200, 1), (3, 599), (1999, 10), (8, 1600), (1, 1), (27, 29), (14, 14), (28, 28), (56, 3000)]
    return extreme + [(int(h), int(w)) for h, w in random.integers(4, 700, (40, 2))]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize(
    "limits", [{}, {"min_pixels": 28 * 28 * 9, "max_pixels": 28 * 28 * 100}], ids=["limits of the Hub", "narrow limits"]
)
def test_patches_equal_the_reference(limits: dict[str, Any]) -> None:
    sizes = random_sizes()
    assert len(sizes) == 50
    reference = Qwen2VLImageProcessorPil(**limits)
    config = PixelConfig(**limits)
    for height, width in sizes:
        array = noise(height, width)
        image = Image.fromarray(array)
        expected = reference(image, return_tensors="np")
        picture = prepare_picture(image, config)
        assert picture.grid == Grid(*expected["image_grid_thw"][0].tolist())
        np.testing.assert_array_equal(picture.patches, expected["pixel_values"])
        if min(height, width) > 4:
            np.testing.assert_array_equal(prepare_picture(array, config).patches, picture.patches)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([14, 28, 32]), st.integers(1, 40), st.integers(40, 5000))
def test_sizes_equal_the_reference(height: int, width: int, factor: int, low: int, high: int) -> None:
    limits = (low * factor**2, high * factor**2)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect"):
            smart_resize(height, width, factor, *limits)
        with pytest.raises(RequestError, match="too narrow"):
            fit_size(height, width, factor, *limits)
        return
    size = fit_size(height, width, factor, *limits)
    assert size == smart_resize(height, width, factor, *limits)
    assert size[0] % factor == size[1] % factor == 0 < min(size)


@settings(max_examples=30)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([(14, 2, 2), (16, 2, 2), (8, 3, 1), (4, 1, 3)]),
    st.integers(0, 2**32 - 1),
)
def test_patches_equal_the_reference_for_other_patches(height: int, width: int, shape: tuple[int, int, int], seed: int) -> None:
    patch, temporal_patch, merge = shape
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    limits: dict[str, Any] = {"min_pixels": 1000, "max_pixels": 9000}
    statistics: dict[str, Any] = {"image_mean": [0.5, 0.25, 0.1], "image_std": [0.3, 1.0, 0.7]}
    reference = Qwen2VLImageProcessorPil(patch_size=patch, temporal_patch_size=temporal_patch, merge_size=merge, **limits, **statistics)
    expected = reference(image, return_tensors="np")
    picture = prepare_picture(
        image, PixelConfig(**limits, patch=patch, temporal_patch=temporal_patch, merge=merge, mean=(0.5, 0.25, 0.1), std=(0.3, 1.0, 0.7))
    )
    assert picture.grid == Grid(*expected["image_grid_thw"][0].tolist())
    np.testing.assert_array_equal(picture.patches, expected["pixel_values"])


def images() -> dict[str, Image.Image]:
    rgba = Image.fromarray(noise(40, 60, 4), "RGBA")
    transparent_palette = rgba.convert("P")
    transparent_palette.info["transparency"] = 3
    return {
        "RGB": rgba.convert("RGB"),
        "RGBA": rgba,
        "L": rgba.convert("L"),
        "LA": rgba.convert("LA"),
        "P": rgba.convert("P"),
        "transparent P": transparent_palette,
        "CMYK": rgba.convert("CMYK"),
        "1": rgba.convert("1"),
        "I;16": Image.fromarray(noise(40, 60, 1)[..., 0].astype(np.uint16) * 200),
    }


@pytest.mark.parametrize("mode", images())
def test_images_of_all_modes_as_the_processor_takes_them(mode: str) -> None:
    image = images()[mode]
    expected = Qwen2VLImageProcessorPil()(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(prepare_picture(image, PixelConfig()).patches, expected)


FORMATS = [("RGB", "png"), ("RGB", "jpeg"), ("RGB", "webp"), ("RGB", "bmp"), ("RGBA", "png"), ("L", "jpeg"), ("LA", "png")]
FORMATS += [("P", "gif"), ("transparent P", "png"), ("CMYK", "jpeg"), ("1", "png"), ("I;16", "png")]


@pytest.mark.parametrize(("mode", "kind"), FORMATS)
@pytest.mark.parametrize("orientation", [1, 6])
def test_files_as_the_loader_takes_them(tmp_path: Path, mode: str, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"file.{kind}"
    images()[mode].save(path, kind, exif=exif) if kind != "bmp" else images()[mode].save(path, kind)
    expected = np.asarray(reference_load(str(path)))
    data = path.read_bytes()
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    for source in (path, str(path), path.as_uri(), data, url):
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)
    if orientation == 6 and kind in ("jpeg", "png", "webp"):
        assert expected.shape == (60, 40, 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_arrays_with_one_or_four_channels(channels: int) -> None:
    array = noise(50, 70, channels)
    expected = Qwen2VLImageProcessorPil()(array, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(prepare_picture(array, PixelConfig()).patches, expected)
    np.testing.assert_array_equal(prepare_picture(np.moveaxis(array, -1, 0), PixelConfig()).patches, expected)
    if channels == 1:
        np.testing.assert_array_equal(prepare_picture(array[..., 0], PixelConfig()).patches, expected)


def test_limits_of_one_picture() -> None:
    image = Image.fromarray(noise(300, 300))
    expected = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 9)(image, return_tensors="np")
    picture = prepare_picture(image, PixelConfig(), min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    np.testing.assert_array_equal(picture.patches, expected["pixel_values"])


def test_settings_of_a_model_directory(tmp_path: Path, backbone: BackboneConfig) -> None:
    older, newer, video = tmp_path / "older", tmp_path / "newer", tmp_path / "video"
    for directory in (older, newer, video):
        directory.mkdir()
    (older / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    config = read_pixel_config(older)
    assert (config.min_pixels, config.max_pixels, config.video) == (3136, 12845056, VideoConfig())
    # What the newest release writes when it saves a processor.
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    picture = {key: value for key, value in PREPROCESSOR.items() if key not in ("min_pixels", "max_pixels")}
    (newer / "processor_config.json").write_text(json.dumps({"image_processor": picture | {"size": size, "rescale_factor": 1 / 255}}))
    assert read_pixel_config(newer) == config
    (video / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    settings = {
        "size": {"shortest_edge": 784, "longest_edge": 78400},
        "fps": 1,
        "min_frames": 2,
        "max_frames": 64,
        "max_video_tokens": 1000,
    }
    (video / "video_preprocessor_config.json").write_text(json.dumps(settings))
    assert read_pixel_config(video).video == VideoConfig(1, 2, 64, 784, 78400, 705600)
    config.check(backbone.vision)
    with pytest.raises(RequestError, match=r"patch of 16, .* of 14"):
        PixelConfig(patch=16).check(backbone.vision)


def test_a_reference_saved_is_read_as_it_is(tmp_path: Path) -> None:
    Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=784 * 20, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    config = read_pixel_config(tmp_path)
    assert (config.min_pixels, config.max_pixels, config.mean) == (784, 784 * 20, (0.1, 0.2, 0.3))


def broken_files(directory: Path) -> dict[str, tuple[Any, str]]:
    (directory / "text.png").write_text("no picture")
    buffer = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(buffer, "jpeg")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    (directory / "short.jpg").write_bytes(half)
    return {
        "no picture": (directory / "text.png", "text.png is no picture in a format known here"),
        "truncated": (directory / "short.jpg", "short.jpg cannot be read as a picture: .*truncated"),
        "truncated and not yet read": (Image.open(io.BytesIO(half)), "the picture cannot be read as a picture: .*truncated"),
        "missing": (directory / "none.png", "none.png does not exist"),
        "in a bucket": ("gs://bucket/a.png", r"gs://bucket/a.png lies in a bucket: .*pip install 'blm-jax\[gcs\]'"),
        "in an unknown place": ("ipfs://a/b.png", "ipfs://a/b.png: no such kind of path; buckets begin with gs:// or s3://"),
        "directory": (directory, "cannot be opened: Is a directory"),
        "from the net": ("https://example.org/a.png", "not fetched from the net"),
        "no base64": ("data:image/png;base64,@@@@", "no base64"),
        "no comma": ("data:image/png;base64", "no comma"),
        "empty bytes": (b"", "the picture is no picture in a format known here"),
        "floats": (np.zeros((8, 8, 3)), "must be uint8"),
        "a vector": (np.zeros(8, np.uint8), r"must be \[height, width, 3\], not \[8\]"),
        "two channels": (np.zeros((8, 8, 2), np.uint8), r"must be \[height, width, 3\]"),
        "no pixels": (np.zeros((0, 8, 3), np.uint8), r"must be \[height, width, 3\]"),
        "a number": (3, "not int"),
        "too narrow": (np.zeros((2, 402, 3), np.uint8), "402x2 pixels is too narrow"),
    }


BROKEN = ["no picture", "truncated", "truncated and not yet read", "missing", "directory", "from the net", "no base64", "no comma"]
BROKEN += ["empty bytes", "in a bucket", "in an unknown place"]
BROKEN += ["floats", "a vector", "two channels", "no pixels", "a number", "too narrow"]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_told_in_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # nothing that reads buckets is installed
    source, message = broken_files(tmp_path)[name]
    with pytest.raises(RequestError, match=message) as caught:
        prepare_picture(source, PixelConfig())
    assert "\n" not in str(caught.value)


def test_a_model_directory_without_settings(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no preprocessor_config\.json"):
        read_pixel_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        read_pixel_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"do_resize": False}))
    with pytest.raises(RequestError, match="do_resize to false"):
        read_pixel_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": 3}, "image_mean is 3, but three numbers are needed"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], but three numbers"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is .*, but three numbers"),
        ({"image_std": [0.5, 0.5, 0.5, 0.5]}, "image_std is .*, but three numbers above 0"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .*, but three numbers above 0"),
        ({"resample": 99}, "resample is 99, but a filter of PIL, 0 to 5,"),
        ({"resample": True}, "resample is True, but a filter of PIL"),
        ({"patch_size": [14]}, r"patch_size is \[14\], but a whole number above 0"),
        ({"merge_size": 0}, "merge_size is 0, but a whole number above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255', but a number above 0"),
        ({"max_pixels": "many"}, "max_pixels is 'many', but a whole number above 0"),
        ({"size": 3}, "size is 3, but an object is needed"),
    ],
)
def test_settings_that_are_wrong(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | settings))
    with pytest.raises(RequestError, match=rf"preprocessor_config\.json: {message}"):
        read_pixel_config(tmp_path)


@pytest.mark.parametrize("settings", [{"fps": "2"}, {"min_frames": 0}, {"max_video_tokens": [3]}, {"size": {"longest_edge": -1}}])
def test_settings_of_videos_that_are_wrong(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match=r"video_preprocessor_config\.json: .* above 0 is needed"):
        read_pixel_config(tmp_path)


def test_json_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        read_pixel_config(tmp_path)
