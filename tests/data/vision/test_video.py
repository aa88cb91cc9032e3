"""Videos: which frames are taken, against files whose frames carry their number; patches against transformers' own."""

from __future__ import annotations

import base64
import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from blm_jax.data.vision.pictures import Picture
from blm_jax.data.vision.pixels import PixelConfig, VideoConfig
from blm_jax.data.vision.video import Timeline, choose_frames, prepare_video, sample_count
from blm_jax.errors import RequestError
from tests.data.reference import video_processor

SIDE = 56
# Small frames are taken as they are, so that numbers can be read from patches.
CONFIG = PixelConfig(video=VideoConfig(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE))


def numbered(number: int) -> np.ndarray:
    """A frame [56, 56, 3] that shows its number as sixteen black or white squares, which survive any codec."""
    bits = (number >> np.arange(16).reshape(4, 4)) & 1
    return np.repeat(np.kron(bits * 255, np.ones((14, 14))).astype(np.uint8)[..., None], 3, axis=-1)


def numbers(picture: Picture) -> list[int]:
    """The numbers of the frames of a prepared video, its temporal patches taken apart."""
    values = picture.patches.reshape(picture.grid.frames, 4, 4, 3, 2, 14, 14).mean(axis=(3, 5, 6))  # [frames, cells, 4, 2]
    bits = values.reshape(-1, 2, 2, 2, 2, 2).transpose(0, 5, 1, 3, 2, 4).reshape(-1, 16) > 0  # merged order to raster order
    return (bits * (1 << np.arange(16))).sum(axis=1).tolist()


def write_video(
    path: Path, times: list[int], time_base: Fraction, codec: str = "libx264", rate: Fraction | None = None, **options: str
) -> Path:
    """A video whose n-th frame shows the number n at times[n], in units of `time_base`."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate or Fraction(25), options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = time_base
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def steady_video(path: Path, frames: int, rate: Fraction, codec: str = "libx264", **options: str) -> Path:
    return write_video(path, list(range(frames)), 1 / rate, codec, rate, **options)


KINDS = [
    ("a.mp4", "libx264", {"g": "12", "bf": "3"}),
    ("open_gop.mp4", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    ("one_key.mp4", "libx264", {"g": "1000"}),
    ("milliseconds.mkv", "libx264", {"g": "12", "bf": "2"}),
    ("a.avi", "mpeg4", {"g": "12"}),
    ("a.webm", "libvpx-vp9", {"g": "30"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), KINDS)
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)], ids=["25", "29.97"])
def test_frames_are_exact(tmp_path: Path, name: str, codec: str, options: dict[str, str], rate: Fraction) -> None:
    """At two frames a second, frame i * total // count is shown at the i-th moment: the reference's choice too."""
    total = 130
    path = steady_video(tmp_path / name, total, rate, codec, **options)
    picture = prepare_video(path, CONFIG)
    count = int(total / rate * 2) // 2 * 2
    chosen = reference_frames(total, float(rate), 2.0)
    assert numbers(picture) == chosen and len(chosen) == count
    assert picture.grid.seconds == pytest.approx(2 / float(count / total * rate), rel=1e-12)
    assert picture.patches.dtype == np.float32
    assert numbers(prepare_video(path, CONFIG, fps=1000.0)) == list(range(130))
    assert numbers(prepare_video(path, CONFIG, frames=6)) == [i * 130 // 6 for i in range(6)]


def reference_frames(total: int, rate: float, fps: float, **limits: Any) -> list[int]:
    owner = SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    return video_processor().sample_frames(owner, metadata, fps=fps, **limits).tolist()


@given(
    st.integers(2, 3000),
    st.sampled_from([5.0, 10.0, 24.0, 25.0, 30.0, 50.0]),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.integers(2, 6),
    st.integers(6, 900),
)
def test_the_choice_of_frames_equals_the_reference(total: int, rate: float, fps: float, low: int, high: int) -> None:
    timeline = Timeline(np.arange(total), np.zeros(1, int), 1 / Fraction(rate), total / Fraction(rate), steady=True)
    count = sample_count(timeline, VideoConfig(fps=fps, min_frames=low, max_frames=high), None, 2)
    assert choose_frames(timeline, count).tolist() == reference_frames(total, rate, fps, min_frames=low, max_frames=high)


def test_an_unsteady_rate_is_sampled_by_time(tmp_path: Path) -> None:
    """Ten frames in the first second, then one a second: by number, nearly all would come from the first second."""
    times = [*range(0, 1000, 100), *range(1000, 10_000, 1000)]  # milliseconds; the last frame stays for 40
    path = write_video(tmp_path / "a.mkv", times, Fraction(1, 1000), g="4")
    picture = prepare_video(path, CONFIG, fps=1.0)
    moments = np.arange(8) * 9040 / 8
    assert numbers(picture) == [max(i for i, time in enumerate(times) if time <= moment) for moment in moments]
    assert picture.grid.seconds == pytest.approx(2 * 9.04 / 8)


def test_sparse_frames_of_a_long_video(tmp_path: Path) -> None:
    """Stretches between key frames are skipped, and the frames are the same."""
    path = steady_video(tmp_path / "a.mp4", 600, Fraction(30), g="10", bf="2")
    for fps in (0.4, 1.0, 3.0):
        assert numbers(prepare_video(path, CONFIG, fps=fps)) == reference_frames(600, 30.0, fps)


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_short_videos(tmp_path: Path, total: int) -> None:
    picture = prepare_video(steady_video(tmp_path / "a.mp4", total, Fraction(10)), CONFIG)
    assert numbers(picture) == {1: [0, 0], 2: [0, 1], 3: [0, 1], 5: [0, 1, 2, 3]}[total]
    assert picture.grid.frames == len(numbers(picture)) // 2


def test_frames_instead_of_a_file(tmp_path: Path) -> None:
    array = np.stack([numbered(i) for i in range(5)])
    for i, frame in enumerate(array):
        Image.fromarray(frame).save(tmp_path / f"{i:05}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    images = [Image.fromarray(frame) for frame in array]
    for source in (array, list(array), images, [str(tmp_path / f"{i:05}.png") for i in range(5)], tmp_path, str(tmp_path)):
        picture = prepare_video(source, CONFIG, fps=4.0)
        assert numbers(picture) == [0, 1, 2, 3, 4, 4]  # the last one fills its temporal patch
        assert picture.grid.seconds == 0.5


def test_bytes_and_urls(tmp_path: Path) -> None:
    path = steady_video(tmp_path / "a.mp4", 20, Fraction(10))
    expected = prepare_video(path, CONFIG)
    data = path.read_bytes()
    for source in (str(path), path.as_uri(), data, f"data:video/mp4;base64,{base64.b64encode(data).decode()}"):
        np.testing.assert_array_equal(prepare_video(source, CONFIG).patches, expected.patches)


def test_a_video_filmed_lying_down_is_turned(tmp_path: Path) -> None:
    frame = np.zeros((28, 56, 3), np.uint8)
    frame[:14, :28] = 255  # the upper left
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    quarter = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 56 << 16, 0, 1 << 30], ">i4")  # clockwise, as phones write it
    data[matrix : matrix + 36] = quarter.tobytes()
    picture = prepare_video(bytes(data), PixelConfig(video=VideoConfig(min_pixels=28 * 56, max_pixels=28 * 56)))
    assert (picture.grid.rows, picture.grid.columns) == (4, 2)
    bright = picture.patches.reshape(-1, 8, 1176)[0].mean(axis=1) > 0  # two merged cells of four patches
    assert bright.tolist() == [False, True, False, True, False, False, False, False]  # the upper right


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(20, 200), st.integers(20, 200), st.integers(1, 8), st.integers(8, 60), st.integers(8, 400))
def test_sizes_follow_the_budget(frames: int, height: int, width: int, low: int, high: int, total: int) -> None:
    """The reference's rule: an even share of the budget, but a little more than the minimum whatever the budget says."""
    video = VideoConfig(min_pixels=low * 784, max_pixels=high * 784, total_pixels=total * 784)
    share = max(min(video.max_pixels, video.total_pixels * 2 // frames), int(video.min_pixels * 1.05))
    array = np.zeros((frames, height, width, 3), np.uint8)
    grid = prepare_video(array, PixelConfig(video=video)).grid
    assert (grid.rows * 14, grid.columns * 14) == smart_resize(height, width, 28, video.min_pixels, share)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_patches_equal_the_reference(frames: int, rows: int, columns: int, seed: int) -> None:
    """Frames that need no resizing, for the reference resizes by torchvision; its cut and its values stand for themselves."""
    height, width = rows * 28, columns * 28
    array = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)
    config = PixelConfig(video=VideoConfig(min_pixels=1, max_pixels=10**9))
    picture = prepare_video(array, config)
    values = torch.from_numpy(array).permute(0, 3, 1, 2)[None].float() * config.rescale
    mean, std = (torch.tensor(statistics)[:, None, None] for statistics in (config.mean, config.std))
    patches, *grid = video_processor().patchify(SimpleNamespace(), (values - mean) / std, 14, 2, 2)
    assert (picture.grid.frames, picture.grid.rows, picture.grid.columns) == tuple(grid)
    np.testing.assert_allclose(picture.patches, patches[0].numpy(), atol=1e-6)


def bad_videos(directory: Path) -> dict[str, Any]:
    (directory / "text.mp4").write_text("no video")
    good = steady_video(directory / "good.mp4", 20, Fraction(10))
    (directory / "short.mp4").write_bytes(good.read_bytes()[:600])
    (directory / "empty").mkdir()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    return {
        "no video": (directory / "text.mp4", {}, "text.mp4 cannot be read as a video"),
        "truncated": (directory / "short.mp4", {}, "short.mp4 cannot be read as a video"),
        "sound": (buffer.getvalue(), {}, "it holds no video stream"),
        "missing": (directory / "none.mp4", {}, "none.mp4 does not exist"),
        "empty directory": (directory / "empty", {}, "the video has no frames in .*empty"),
        "empty list": ([], {}, "the video has no frames"),
        "one picture": (np.zeros((8, 8, 3), np.uint8), {}, r"must be \[frames, height, width, 3\]"),
        "two sizes": ([np.zeros((28, 28, 3), np.uint8), np.zeros((28, 56, 3), np.uint8)], {}, "must be of one size"),
        "no rate": (good, {"fps": 0}, "fps of a video must be a number above 0, not 0"),
        "rate in words": (good, {"fps": "2"}, "fps of a video must be a number above 0, not '2'"),
        "hardly a rate": ([np.zeros((28, 28, 3), np.uint8)] * 3, {"fps": 1e-9}, "fps of a video is 1e-09: it must be at least 0.000001"),
        "too many": (good, {"frames": 21}, "has 20 frames, 21 are asked for"),
        "other frames": ([np.zeros((28, 28, 3), np.uint8)] * 3, {"frames": 2}, "given as 3 frames, which are taken all; 2 cannot"),
        "limits": (good, {"min_pixels": 10**9}, "a minimum of a video is above its maximum"),
        "a number": (3, {}, "not int"),
    }


BAD = ["no video", "truncated", "sound", "missing", "empty directory", "empty list", "one picture", "two sizes", "no rate"]
BAD += ["rate in words", "hardly a rate", "too many", "other frames", "limits", "a number"]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    source, options, message = bad_videos(tmp_path)[name]
    with pytest.raises(RequestError, match=message) as caught:
        prepare_video(source, CONFIG, **options)
    assert "\n" not in str(caught.value)


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    """Its index promises frames that are not there."""
    path = steady_video(tmp_path / "a.avi", 60, Fraction(10), "mpeg4")
    data = path.read_bytes()
    (tmp_path / "b.avi").write_bytes(data[: data.index(b"movi") + 4] + bytes(len(data) // 2))
    with pytest.raises(RequestError, match="cannot be read as a video"):
        prepare_video(tmp_path / "b.avi", CONFIG)


@pytest.mark.parametrize(
    ("name", "codec", "options"), [*KINDS[3:], ("index first.mp4", "libx264", {"g": "12"})], ids=["mkv", "avi", "webm", "mp4"]
)
def test_half_of_a_file_is_no_video(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    """What is left of it decodes without an error."""
    path = steady_video(tmp_path / "whole.mp4" if "index" in name else tmp_path / name, 130, Fraction(25), codec, **options)
    if "index" in name:
        path = copy_with_the_index_first(path, tmp_path / name)
    assert len(numbers(prepare_video(path, CONFIG))) == 10
    data = path.read_bytes()
    with pytest.raises(RequestError, match=r"cannot be read as a video: it breaks off at \d\.\d\d of \d\.\d\d s"):
        prepare_video(data[: len(data) // 2], CONFIG)


def copy_with_the_index_first(source: Path, target: Path) -> Path:
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return target
