"""The bytes of pictures and videos that records name: in files and archives below one folder, or in the record itself.

Records are not to be trusted: no path leads out of the folder, and sizes are known before anything is read or unpacked.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from blm_jax.data.files import one_line, open_path, read_data_url
from blm_jax.data.prompt import short
from blm_jax.data.vision.pictures import rgb_array
from blm_jax.data.vision.video import PICTURE_SUFFIXES
from blm_jax.errors import RequestError

LARGEST = 2**28  # bytes of a picture or video: whoever reads its record reads all of it
MOST_FRAMES = 4096  # of a video that is given as frames
ARCHIVES = (".zip", ".tar")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
KEPT_OPEN = 8  # archives

Members = Callable[[str], bytes]  # reads a member of an archive


class Media:
    """What paths in records name: files below `root`, which is a directory, or members of `root`, which is an archive.

    A path may go on into an archive: `train/part1.zip/0001.jpg`.
    """

    def __init__(self, root: epath.PathLike):
        path = open_path(root)
        if not path.exists():
            raise RequestError(f"{root} does not exist: paths in records are to begin there")
        self.local = "://" not in os.fspath(path)
        self.root = epath.Path(os.path.realpath(path)) if self.local else path
        self.is_archive = not path.is_dir()
        if self.is_archive and path.suffix.lower() not in ARCHIVES:
            raise RequestError(f"{root} is no directory and no {' or '.join(ARCHIVES)}: paths in records are to begin there")
        self._archives: dict[str, Members | RequestError] = {}  # the last ones used

    def load(self, source: Any, kind: str) -> bytes | list[bytes]:
        """The file's bytes; of a video that is given as frames, each frame's."""
        if kind == "video" and (isinstance(source, (list, tuple)) or (isinstance(source, np.ndarray) and source.ndim == 4)):
            return self._frames(list(source))
        if kind == "video" and isinstance(source, (str, os.PathLike)) and (frames := self._directory(source)) is not None:
            return self._frames(frames)
        return self._load_one(source, kind)

    def _frames(self, sources: list[Any]) -> list[bytes]:
        if not 1 <= len(sources) <= MOST_FRAMES:
            raise RequestError(f"a video of {len(sources)} frames: it can have 1 to {MOST_FRAMES}")
        frames: list[bytes] = []
        left = LARGEST
        for source in sources:
            frames.append(self._load_one(source, "frame"))
            left -= len(frames[-1])
            if left < 0:
                raise RequestError(f"the frames of a video are more than {LARGEST} bytes: cut it into clips")
        return frames

    def _load_one(self, source: Any, kind: str) -> bytes:
        if isinstance(source, np.ndarray) and kind != "video":
            return _png(rgb_array(source))
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        elif isinstance(source, str) and source.startswith("data:"):
            _check_size(len(source) * 3 // 4 - len("data:,") * 8, kind)
            data = read_data_url(source, kind)
        elif isinstance(source, (str, os.PathLike)):
            data = self._read(os.fspath(source), kind)
        else:
            raise RequestError(f"{kind}: a path, a data: URL or bytes is needed, not {short(source)}")
        _check_size(len(data), kind)
        if not data:
            raise RequestError(f"a {kind} has no bytes{f': {short(source)}' if isinstance(source, str) else ''}")
        return data

    # --- paths -----------------------------------------------------------------------------------------------------------

    def _parts(self, name: Any, kind: str) -> tuple[str, ...]:
        """Of a path that lies below the root."""
        text = os.fspath(name)
        if text.startswith("file:"):
            text = urllib.parse.unquote(urllib.parse.urlparse(text).path)
        if text.startswith(("http:", "https:")):
            raise RequestError(f"{kind} {short(text)} is not fetched from the net: download it and name the file")
        if (self.local and "://" in text) or not _is_path(text):
            raise RequestError(f"{kind} {short(text)} is no path")
        outside = RequestError(f"{kind} {short(text)} lies outside {self.root}: paths in records stay below it (see --root)")
        path = PurePosixPath(text)
        if path.is_absolute() or "://" in text:
            root = os.fspath(self.root)
            if text != root and not text.startswith(root + "/"):
                raise outside
            path = PurePosixPath(text[len(root) :].lstrip("/"))
        parts: list[str] = []
        for part in path.parts:
            if part == ".." and not parts:
                raise outside
            parts = parts[:-1] if part == ".." else [*parts, part]
        if self.local and not self._is_below(self.root.joinpath(*parts)):
            raise outside
        return tuple(parts)

    def _is_below(self, path: epath.Path) -> bool:
        """A link below the root may lead out of it."""
        return os.path.realpath(path) == os.fspath(self.root) or os.path.realpath(path).startswith(os.path.join(self.root, ""))

    def _directory(self, name: Any) -> list[str] | None:
        """The pictures of a directory, by name; none if it is something else."""
        if self.is_archive or (isinstance(name, str) and name.startswith("data:")):
            return None
        path = self.root.joinpath(*self._parts(name, "video"))
        try:
            if not path.is_dir():
                return None
            return sorted(os.fspath(file) for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
        except OSError as error:
            raise RequestError(f"video {short(name)} cannot be opened: {error.strerror or one_line(error)}") from error

    def _read(self, name: str, kind: str) -> bytes:
        parts = self._parts(name, kind)
        try:
            if self.is_archive:
                return self._members(self.root)("/".join(parts))
            path = self.root
            for i, part in enumerate(parts):
                path = path / part
                inner = parts[i + 1 :]
                if inner and part.lower().endswith(ARCHIVES) and path.is_file():
                    return self._members(path)("/".join(inner))
                if inner and part.lower().endswith(PACKED) and path.is_file():
                    raise RequestError(f"{part} cannot be read member by member: make it a .tar or .zip, or unpack it")
            return self._read_file(path)
        except FileNotFoundError:
            raise RequestError(f"{kind} {short(name)} does not exist below {self.root}") from None
        except OSError as error:
            raise RequestError(f"{kind} {short(name)} cannot be opened: {error.strerror or one_line(error)}") from error
        except RequestError as error:
            raise RequestError(f"{kind} {short(name)}: {error}") from error

    def _read_file(self, path: epath.Path) -> bytes:
        if not self.local:
            _check_size(path.stat().length, "file")
            return path.read_bytes()
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise RequestError("it is no file")
        _check_size(status.st_size, "file")
        return path.read_bytes()

    # --- archives --------------------------------------------------------------------------------------------------------

    def _members(self, path: epath.Path) -> Members:
        key = os.fspath(path)
        members = self._archives.pop(key, None)
        if members is None:
            if len(self._archives) >= KEPT_OPEN:
                del self._archives[next(iter(self._archives))]
            try:
                members = (_zip_members if path.suffix.lower() == ".zip" else _tar_members)(path.open("rb"))
            except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, OSError) as error:
                # Kept, so that it is not tried again for each of its pictures.
                members = RequestError(f"the archive cannot be read: {one_line(error)}")
        self._archives[key] = members
        if isinstance(members, RequestError):
            raise members
        return members


def _zip_members(file: Any) -> Members:
    archive = zipfile.ZipFile(file)

    def read(name: str) -> bytes:
        try:
            info = archive.getinfo(name)
        except KeyError:
            raise RequestError("the archive has no such member") from None
        _check_size(info.file_size, "member of an archive")  # known before it is unpacked, and no more than that is
        try:
            with archive.open(info) as member:
                return member.read()
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            raise RequestError(f"the archive's member cannot be unpacked: {one_line(error)}") from error

    return read


def _tar_members(file: Any) -> Members:
    places: dict[str, tuple[int, int] | None] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            if not member.isdir():
                plain = member.isreg() and not member.issparse()
                places[member.name.removeprefix("./")] = (member.offset_data, member.size) if plain else None
            archive.members = []  # type: ignore[assignment]  # it would keep them all

    def read(name: str) -> bytes:
        if name not in places:
            raise RequestError("the archive has no such member")
        place = places[name]
        if place is None:
            raise RequestError("the archive's member is a link or the like, and no plain file")
        start, size = place
        _check_size(size, "member of an archive")
        file.seek(start)
        data = file.read(size)
        if len(data) < size:
            raise RequestError("the archive breaks off before the end of its member")
        return data

    return read


def _is_path(text: str) -> bool:
    try:
        return bool(text.strip()) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False


def _check_size(size: int, kind: str) -> None:
    if size > LARGEST:
        raise RequestError(f"a {kind} of {size} bytes is too large, {LARGEST} are allowed: make it smaller, or cut it into clips")


def _png(pixels: np.ndarray) -> bytes:
    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, "PNG")
    return contents.getvalue()
