"""The processes of one run, and the steps they take together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from blm_jax.errors import RunError

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
