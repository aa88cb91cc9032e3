"""Pictures and videos that records name: read from files, archives and bytes, never from outside the folder; sizes by their headers."""

from __future__ import annotations

import base64
import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_jax.data.corpora import media
from blm_jax.data.corpora.media import Media
from blm_jax.data.vision import headers
from blm_jax.data.vision.headers import picture_tokens, video_tokens
from blm_jax.data.vision.pictures import prepare_picture
from blm_jax.data.vision.pixels import PixelConfig, VideoConfig
from blm_jax.data.vision.video import prepare_video
from blm_jax.errors import RequestError
from tests.data.corpora.material import encoded, mp4, pixels, png

CONTENTS = {"a.png": png(20, 30), "sub/b.png": png(30, 20, 1), "clip.mp4": mp4(4)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files, frames and archives, with things outside of it that nothing may lead to."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.png").write_bytes(png(9, 9))
    root = outside / "data"
    for name, data in CONTENTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    with zipfile.ZipFile(root / "part.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in CONTENTS.items():
            archive.writestr(name, data)
        archive.writestr("../up.png", b"up")
    with tarfile.open(root / "part.tar", "w") as archive:
        for name in CONTENTS:
            archive.add(root / name, f"./{name}")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
        archive.addfile(link)
    (root / "frames").mkdir()
    for i in range(3):
        (root / "frames" / f"{i:04}.png").write_bytes(png(20, 20, i))
    (root / "frames" / "notes.txt").write_text("no frame")
    (root / "no frames").mkdir()
    (root / "out.png").symlink_to("../secret.png")
    (root / "in.png").symlink_to("a.png")
    (root / "up").symlink_to("..")
    (root / "empty.png").write_bytes(b"")
    (root / "broken.zip").write_bytes((root / "part.zip").read_bytes()[:100])
    (root / "broken.tar").write_bytes(b"nothing of a tar" * 100)
    (root / "part.tgz").write_bytes(b"")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("place", ["", "part.zip", "part.tar"])
@pytest.mark.parametrize("name", sorted(CONTENTS))
def test_files_and_members(root: Path, place: str, name: str) -> None:
    kind = "video" if name.endswith(".mp4") else "image"
    assert Media(root).load(os.path.join(place, name), kind) == CONTENTS[name]
    assert Media(root / place).load(name, kind) == CONTENTS[name]
    assert Media(root).load(os.path.join("no frames", "..", place, name), kind) == CONTENTS[name]


def test_other_forms(root: Path) -> None:
    folder = Media(root)
    data = CONTENTS["a.png"]
    assert folder.load(str(root / "a.png"), "image") == data
    assert folder.load(f"file://{root}/a.png", "image") == data
    assert folder.load("in.png", "image") == data
    assert folder.load(data, "image") == folder.load(bytearray(data), "image") == data
    assert folder.load("data:image/png;base64," + base64.b64encode(data).decode(), "image") == data
    array = pixels(20, 30)
    np.testing.assert_array_equal(np.asarray(media.Image.open(io.BytesIO(folder.load(array, "image")))), array)  # type: ignore[arg-type]
    frames = [png(20, 20, i) for i in range(3)]
    assert folder.load("frames", "video") == frames
    assert folder.load([f"frames/{i:04}.png" for i in range(3)], "video") == frames
    assert len(folder.load(np.stack([array, array]), "video")) == 2


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("../secret.png", "image", "lies outside"),
        ("sub/../../secret.png", "image", "lies outside"),
        ("out.png", "image", "lies outside"),
        ("up/secret.png", "image", "lies outside"),
        ("up", "video", "lies outside"),
        ("..", "video", "lies outside"),
        ("/etc/passwd", "image", "lies outside"),
        ("file:///etc/passwd", "image", "lies outside"),
        ("file:../secret.png", "image", "lies outside"),
        ("~/secret.png", "image", "does not exist"),
        ("part.zip/../../secret.png", "image", "lies outside"),
        ("part.tar/link.png", "image", "is a link or the like"),
        ("https://example.org/a.png", "image", "is not fetched from the net"),
        ("gs://bucket/a.png", "image", "is no path"),
        ("", "image", "is no path"),
        ("a\0.png", "image", "is no path"),
        ("\ud800.png", "image", "is no path"),
        ("x" * 5000, "image", "cannot be opened: File name too long"),
        ("none.png", "image", "'none.png' does not exist below"),
        ("a.png/b.png", "image", "cannot be opened: Not a directory"),
        ("sub", "image", "it is no file"),
        ("pipe.png", "image", "it is no file"),
        ("pipe.png", "video", "it is no file"),
        ("no frames", "video", "a video of 0 frames"),
        ([], "video", "a video of 0 frames"),
        ([["a.png"]], "video", "is needed, not"),
        ("empty.png", "image", "has no bytes: 'empty.png'"),
        (b"", "image", "has no bytes"),
        ("data:image/png", "image", "no comma"),
        ("data:image/png;base64,***", "image", "data: URL"),
        (7, "image", "a path, a data: URL or bytes is needed, not 7"),
        (True, "video", "is needed, not True"),
        ({"a": 1}, "image", "is needed, not {'a': 1}"),
        (["a.png"], "image", "is needed, not"),
        (np.zeros((2, 2), np.float32), "image", "must be uint8"),
        ("part.zip/none.png", "image", "the archive has no such member"),
        ("part.tar/none.png", "image", "the archive has no such member"),
        ("part.tgz/a.png", "image", "cannot be read member by member"),
        ("broken.zip/a.png", "image", "the archive cannot be read"),
        ("broken.tar/a.png", "image", "the archive cannot be read"),
    ],
)
def test_what_is_not_read(root: Path, source: Any, kind: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        Media(root).load(source, kind)
    assert "\n" not in str(caught.value)


def test_roots_that_are_none(root: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        Media(root / "none")
    with pytest.raises(RequestError, match=r"no directory and no .zip or .tar"):
        Media(root / "a.png")


def test_sizes_are_known_before_anything_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * 100_000)
    (root / "bomb.zip").write_bytes(bomb.getvalue())
    (root / "large.png").write_bytes(b"\0" * 100_000)
    monkeypatch.setattr(media, "LARGEST", 50_000)
    url = "data:image/png;base64," + "A" * 100_000
    for source in ("bomb.zip/a.png", "large.png", url, b"\0" * 100_000):
        with pytest.raises(RequestError, match="bytes is too large, 50000 are allowed"):
            Media(root).load(source, "image")
    with pytest.raises(RequestError, match="the frames of a video are more than 50000 bytes"):
        Media(root).load([b"\0" * 30_000] * 2, "video")
    monkeypatch.setattr(media, "MOST_FRAMES", 1)
    with pytest.raises(RequestError, match="a video of 2 frames: it can have 1 to 1"):
        Media(root).load(["a.png", "a.png"], "video")


def test_archives_are_opened_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = media._zip_members
    monkeypatch.setattr(media, "_zip_members", lambda file: opened.append(file) or real(file))
    folder = Media(root)
    for _ in range(3):
        folder.load("part.zip/a.png", "image")
        with pytest.raises(RequestError):
            folder.load("broken.zip/a.png", "image")
    assert len(opened) == 2


# --- what headers say ----------------------------------------------------------------------------------------------------------

CONFIG = PixelConfig(max_pixels=28 * 28 * 30, video=VideoConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 4))
limits = st.fixed_dictionaries({}, optional={"min_pixels": st.integers(1, 50_000), "max_pixels": st.integers(1, 50_000)})


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), limits)
def test_tokens_of_a_picture(height: int, width: int, form: str, limits: dict[str, int]) -> None:
    data = encoded(pixels(height, width), form)
    try:
        expected = prepare_picture(data, CONFIG, **limits).grid.visual_tokens(2)
    except RequestError as error:
        with pytest.raises(RequestError) as caught:
            picture_tokens(data, limits, CONFIG)
        assert str(caught.value) == str(error)
    else:
        assert picture_tokens(data, limits, CONFIG) == expected


@pytest.mark.parametrize("frames", [1, 2, 5, 23])
@pytest.mark.parametrize("asked", [{}, {"fps": 5.0}, {"frames": 2}, {"max_frames": 6, "fps": 10.0}, {"total_pixels": 3000}])
def test_tokens_of_a_video(frames: int, asked: dict[str, Any]) -> None:
    given = [png(40, 60, i) for i in range(frames)]
    for source in (mp4(frames), mp4(frames, form="matroska"), given):
        try:
            expected = prepare_video(source, CONFIG, **asked).grid.visual_tokens(2)
        except RequestError as error:
            assert "asked for" in str(error)
        else:
            assert video_tokens(source, asked, CONFIG) == expected


def png_header(width: int, height: int) -> bytes:
    """A picture of some bytes that promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png_header(60_000, 60_000), "has more than 67108864 pixels|a picture has more than"),
        (png_header(10_000, 10_000), "a picture of 10000x10000 has more than 67108864 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "in no format known here: give BMP, GIF"),
        (b"nothing", "in no format known here"),
        (png(20, 20)[:20], "cannot be read|no format known"),
    ],
)
def test_pictures_that_are_none(data: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        picture_tokens(data, {}, CONFIG)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "a video is in no format known here"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "a video is in no format known here"),
        (png(20, 20), "a video is in no format known here"),
        (mp4(5)[:200], "the video cannot be read"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 100, "the video cannot be read"),
    ],
)
def test_videos_that_are_none(data: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        video_tokens(data, {}, CONFIG)


def test_a_video_whose_frames_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "LARGEST", 1000)
    with pytest.raises(RequestError, match="a video of 32x32 has more than 1000 pixels"):
        video_tokens(mp4(2), {}, CONFIG)


def test_a_file_without_pictures_is_no_video() -> None:
    contents = io.BytesIO()
    with av.open(contents, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(RequestError, match="it holds no video stream"):
        video_tokens(contents.getvalue(), {}, CONFIG)
