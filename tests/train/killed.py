"""Writers of checkpoints that are killed, started by test_checkpoints.py: `killed.py everywhere|anytime DIRECTORY rename|marker`.

Each is a fork of this process, which has imported everything and started nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from blm_jax.train.checkpoints import Checkpoints
from tests.train.trees import ASSETS, PROVENANCE, Trees, abstract, values

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
KILLS = 10


def save_first(directory: Path, rename: bool) -> None:
    with Checkpoints(directory, keep=1, rename=rename) as checkpoints:
        checkpoints.save(1, *values(1, abstract()), {"step": 1}, ASSETS, PROVENANCE)


def save_second(directory: Path, rename: bool, kill_at: int) -> None:
    """Step 2 beside step 1, which is then removed. Killed before what would be its n-th change of a file."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        removes_tree = event == "os.rmdir" and arguments[1] != -1  # its name is relative to a directory
        if removes_tree or (writes and str(arguments[0]).startswith(str(directory))):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    with Checkpoints(directory, keep=1, rename=rename) as checkpoints:
        sys.addaudithook(count)
        checkpoints.save(2, *values(2, abstract()), {"step": 2}, ASSETS, PROVENANCE)


def kill_everywhere(directory: Path, rename: bool) -> None:
    """DIRECTORY/N is what was left by the writer that was killed before its n-th change; the last one lived."""
    assert wait(forked(save_first, directory / "0", rename)) == 0
    for number in range(1, 1000, 8 if rename else 1):  # what a store without renaming must stand, one with it does
        copy = shutil.copytree(directory / "0", directory / str(number))
        if wait(forked(save_second, copy, rename, number)) == 0:
            return


def train(directory: Path, rename: bool, more: int, told: int) -> None:
    """Every step depends on all before it, and is saved."""
    with Checkpoints(directory, keep=2, rename=rename) as checkpoints:
        restored = checkpoints.restore(*abstract())
        step, trees = (restored.step, (restored.params, restored.state)) if restored else (0, values(0, abstract()))
        for _ in range(more):
            step, trees = step + 1, changed(trees, step + 1)
            checkpoints.save(step, *trees, {"step": step}, ASSETS, PROVENANCE)
            os.write(told, b".")


def changed(trees: Trees, step: int) -> Trees:
    def change(leaf: jax.Array) -> jax.Array:
        whole = np.asarray(leaf)
        bits = whole.reshape(-1).view(f"u{whole.dtype.itemsize}")
        return jax.numpy.asarray((bits * 5 + step).astype(bits.dtype).view(whole.dtype).reshape(whole.shape))

    return jax.tree.map(change, trees)


def kill_anytime(directory: Path, rename: bool) -> None:
    """Killed some steps after it began, in the midst of a save or of the removal of an old checkpoint; the last one lives."""
    chance = random.Random(0)
    heard, told = os.pipe()
    for _ in range(KILLS):
        child = forked(train, directory, rename, 1000, told)
        for _ in range(chance.randint(2, 3)):
            os.read(heard, 1)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        wait(child)
        os.set_blocking(heard, False)
        while left_to_read(heard):
            pass
        os.set_blocking(heard, True)
    assert wait(forked(train, directory, rename, 2, told)) == 0


def left_to_read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 100)
    except BlockingIOError:
        return b""


def forked(work: Callable[..., None], *arguments: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def wait(child: int) -> int:
    """0 or the signal that killed it."""
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status


if __name__ == "__main__":
    {"everywhere": kill_everywhere, "anytime": kill_anytime}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3] == "rename")
