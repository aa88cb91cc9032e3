"""A stand-in for buckets: gs:// in the memory of this process, with what makes buckets differ from disks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import pytest
from etils.epath import backend

from blm_jax.data import files

ROOT = "gs://bucket"


class Bucket(fsspec.AbstractFileSystem):
    """There are no directories, nothing is renamed or appended to, and an object is there when all of it was written."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.written: list[str] = []  # in order
        self.full = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = str(self._strip_protocol(path))
        found: dict[str, dict[str, Any]] = {}
        for name, data in self.objects.items():
            if name == path:
                found[name] = {"name": name, "size": len(data), "type": "file"}
            elif name.startswith(f"{path}/"):
                below, rest, _slash = name[len(path) + 1 :].partition("/")
                size = 0 if rest else len(data)
                found[f"{path}/{below}"] = {"name": f"{path}/{below}", "size": size, "type": "directory" if rest else "file"}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else sorted(found)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Names may hold slashes: there is nothing to make."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nor here."""

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("nothing is renamed in a bucket")

    def _rm(self, path: str) -> None:
        del self.objects[str(self._strip_protocol(path))]

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> io.BytesIO:
        if mode == "wb":
            return _Upload(self, path)
        if mode != "rb":
            raise NotImplementedError(mode)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self.objects[path])


class _Upload(io.BytesIO):
    def __init__(self, bucket: Bucket, path: str):
        super().__init__()
        self.bucket, self.path = bucket, path

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            super().close()  # given up
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if not self.closed:
            if self.bucket.full:
                raise OSError(28, "No space left on device")
            self.bucket.objects[self.path] = self.getvalue()
            self.bucket.written.append(self.path.rpartition("/")[2])
        super().close()


def use(patch: pytest.MonkeyPatch, home: Path) -> Bucket:
    """gs:// is this bucket while the patch lasts; what is fetched from it is kept below `home`."""
    bucket = Bucket()
    systems = {"gcs": bucket}
    patch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda _, name: systems.get(name) or fsspec.filesystem(name))
    patch.setattr(files, "BUCKETS", {"gs": ("fsspec", "nothing")})
    patch.setenv("HOME", str(home))
    return bucket


def upload(bucket: Bucket, directory: Path, name: str) -> str:
    """A directory as it lies on a disk; its place in the bucket."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            bucket.objects[f"bucket/{name}/{path.relative_to(directory)}"] = path.read_bytes()
    return f"{ROOT}/{name}"
