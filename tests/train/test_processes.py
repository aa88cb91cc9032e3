"""Two processes of four devices each train as one process with one device does, and go on from each other's checkpoints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blm_jax.config import HardwareConfig, MeshConfig
from blm_jax.recipe import CheckpointConfig
from tests.conftest import ROOT
from tests.train.worlds import World, make_world, rows_of, write

# The sockets between CPUs wait up to 40 ms for an acknowledgement at each turn of a ring: minutes, `make test-long`.
pytestmark = pytest.mark.long
PROGRAM = "import sys; from blm_jax.cli import entry; entry()"
STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def start(config: Path, count: int, devices: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    joined = [["--coordinator", coordinator, "--processes", str(count), "--process", str(i)] if count > 1 else [] for i in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "train", str(config), *flags],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for flags in joined
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    try:
        said = [process.communicate(timeout=1200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), [error[-3000:] for _, error in said]
    return [error for _, error in said]


@pytest.mark.parametrize(("which", "name"), [(1, "loss"), (2, "action")])
def test_as_one_process(world: World, tmp_path: Path, which: int, name: str) -> None:
    make = world.stage_one if which == 1 else world.stage_two
    spread = HardwareConfig(mesh=MeshConfig(data=2, fsdp=4, tensor=1))
    settings = {"steps": STEPS, "batch": 8, "checkpoints": CheckpointConfig(every=100)}
    alone, both = make(tmp_path / "alone", **settings), replace(make(tmp_path / "both", **settings), hardware=spread)
    finish(start(write(alone, tmp_path / "alone.yaml"), 1, 1))
    said = finish(start(write(both, tmp_path / "both.yaml"), 2, 4))
    one, other = rows_of(tmp_path / "alone"), rows_of(tmp_path / "both")
    assert [row["step"] for row in other] == list(range(1, STEPS + 1))
    assert other[0][name] == pytest.approx(one[0][name], rel=1e-5)
    assert other[-1][name] == pytest.approx(one[-1][name], rel=1e-3)
    assert "goodput" in said[0] and "goodput" not in said[1]  # one of them speaks


def test_both_stop_when_one_is_asked_to(world: World, tmp_path: Path) -> None:
    spread = HardwareConfig(mesh=MeshConfig(data=1, fsdp=8, tensor=1))
    run = world.stage_two(tmp_path / "run", steps=100000, batch=8, hardware=spread, checkpoints=CheckpointConfig(every=100000))
    processes = start(write(run, tmp_path / "run.yaml"), 2, 4)
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 600
    while (not log.exists() or len(log.read_bytes()) < 1000) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 143)
    [step] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 0 <= step - rows_of(tmp_path / "run")[-1]["step"] <= 1
