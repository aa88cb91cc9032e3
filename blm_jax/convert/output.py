"""An output directory that appears whole or not at all, written by any number of processes."""

from __future__ import annotations

import fcntl
import os
import shutil
from types import TracebackType

from etils import epath

from blm_jax.convert.team import Team
from blm_jax.errors import RequestError
from blm_jax.weights.safetensors_file import is_local


class Output:
    """A context in which `directory` is filled. Left without an error, it becomes `target`; otherwise nothing remains.

    Locally it is a hidden sibling that is renamed at the end. A bucket knows no renaming: there it is the target itself,
    and whoever fills it writes last the file without which it is no MODEL.
    """

    def __init__(self, target: epath.Path, size: int, team: Team):
        self.target, self.size, self.team = target, size, team
        self.local = is_local(target)
        self.directory = target.parent / f".{target.name}.partial" if self.local else target
        self._lock: int | None = None

    def __enter__(self) -> Output:
        self.team.together(self._check)
        self.team.together(self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.team.together(self._commit)
        finally:
            if self.team.leads and (self.local or error is not None):
                self.directory.rmtree(missing_ok=True)
            self._unlock()

    def _check(self) -> None:
        if self.target.exists() or (self.local and os.path.lexists(self.target)):  # a link may lead nowhere
            raise RequestError(f"{self.target} exists; choose another directory or remove it")
        if not self.local:
            return
        above = self.target.parent
        while not above.exists():
            above = above.parent
        free = shutil.disk_usage(above).free
        if free < self.size:
            raise RequestError(f"{self.target} needs {self.size / 1e9:.1f} GB, but {above} has {free / 1e9:.1f} GB free")

    def _commit(self) -> None:
        if self.team.leads and self.local:
            # After a loss of power there must not be a name without its contents.
            for folder, _, files in os.walk(self.directory):
                for name in files:
                    _sync(os.path.join(folder, name))
                _sync(folder)
            os.rename(self.directory, self.target)
            _sync(self.target.parent)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _begin(self) -> None:
        if not self.team.leads:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self.local:
                return
            # What a killed run left is thrown away, but not from under a run that lives.
            self._lock = os.open(self.directory, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.directory.iterdir():
                path.rmtree() if path.is_dir() else path.unlink()
        except BlockingIOError:
            raise RequestError(f"{self.target} is being written by another process; wait for it or choose another directory") from None
        except OSError as error:
            raise RequestError(f"{self.target} cannot be written: {error.strerror or error}") from None


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
