"""Writes episodes as they come, from simulators or from anywhere: as RLDS, or as LeRobot v3.0. A set appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from typing import Any, Literal

from etils import epath

from blm_jax.data.demos.episodes import Recording, check_recording
from blm_jax.data.demos.lerobot_writer import LeRobotWriter
from blm_jax.data.demos.rlds import RldsWriter
from blm_jax.data.demos.robots import Robot
from blm_jax.data.files import one_line, open_path
from blm_jax.errors import RequestError, RunError

Form = Literal["rlds", "lerobot"]


class Recorder:
    """`with Recorder(path, robot) as recorder: recorder.add(recording)`: an error within leaves nothing behind.

    RLDS keeps the observation after the last action, and pictures without loss. LeRobot keeps as many observations as there are
    actions, and its videos lose a little; of as many observations as actions, RLDS loses the last action to its readers.
    """

    def __init__(self, path: epath.PathLike, robot: Robot, form: Form = "rlds"):
        self._target = open_path(path)
        if "://" in os.fspath(path):
            raise RequestError(f"{path} lies in a bucket: record to a disk, and copy the set when it is whole")
        if self._target.exists():
            raise RequestError(f"{path} exists; choose another directory or remove it")
        self._partial = self._target.parent / f".{self._target.name}.{secrets.token_hex(4)}"
        self._robot, self.count = robot, 0
        try:
            self._partial.mkdir(parents=True)
            self._writer: Any = (RldsWriter if form == "rlds" else LeRobotWriter)(self._partial, robot)
        except OSError as error:
            self.abandon()
            raise RequestError(f"{path} cannot be written: {error.strerror or one_line(error)}") from error
        except RequestError:
            self.abandon()
            raise

    def add(self, recording: Recording) -> None:
        """Refuses what would be read back as a bad episode; the recorder goes on without it."""
        check_recording(recording, self._robot, self.count)
        try:
            self._writer.add(recording)
        except OSError as error:
            raise RunError(f"{self._target} cannot be written: {error.strerror or one_line(error)}") from error
        self.count += 1

    def close(self) -> None:
        """The set appears."""
        try:
            if not self.count:
                raise RequestError(f"{self._target}: there is no episode to write")
            self._writer.close()
            os.rename(self._partial, self._target)
        except OSError as error:
            raise RunError(f"{self._target} cannot be written: {error.strerror or one_line(error)}") from error
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nothing is left of what was added."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
