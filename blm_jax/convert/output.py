"""An output directory that appears whole or not at all, written by any number of processes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
from etils import epath

from blm_jax.errors import RequestError, RunError
from blm_jax.weights.safetensors_file import is_local

Result = TypeVar("Result")


@dataclass(frozen=True)
class Team:
    """The processes of one run. All of them take the same steps; process 0 leads."""

    index: int = 0
    count: int = 1

    @staticmethod
    def of_all_processes() -> Team:
        import jax  # late: alone, a process has no need of devices

        if not jax.distributed.is_initialized():
            return Team()
        return Team(jax.process_index(), jax.process_count())

    @property
    def leads(self) -> bool:
        return self.index == 0

    def share(self, work: list[Result]) -> list[Result]:
        return work[self.index :: self.count]

    def together(self, step: Callable[[], Result]) -> Result:
        """Take a step and wait for the others. Where one fails, all do."""
        try:
            result = step()
        except Exception:
            self._gather(np.ones((), np.uint8))
            raise
        failed = np.flatnonzero(self._gather(np.zeros((), np.uint8)))
        if failed.size:
            raise RunError(f"process {failed[0]} of {self.count} failed; its own message says why")
        return result

    def merge(self, digests: dict[str, bytes], names: list[str]) -> dict[str, bytes]:
        """SHA-256 of every tensor, from the processes that have hashed them."""
        mine = np.stack([np.frombuffer(digests.get(name, bytes(32)), np.uint8) for name in names])
        merged = np.bitwise_or.reduce(self._gather(mine), axis=0)
        return {name: row.tobytes() for name, row in zip(names, merged, strict=True)}

    def _gather(self, value: np.ndarray) -> np.ndarray:
        if self.count == 1:
            return value[None]
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value))


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
        if self.target.exists():
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
            os.rename(self.directory, self.target)

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
