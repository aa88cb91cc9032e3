"""`blm eval world`: the same episodes on any mesh and in any number of starts, and requests that are refused in a line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blm_jax.cli import main
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.runs.command import right_moved
from tests.conftest import ROOT
from tests.evaluate.world.runs.driven import write_driver

CELLS = ["--robots", "panda,xarm6", "--tasks", "PickCube,PushCube", "--episodes", "4", "--seed", "3"]
STEPS = 16  # of an episode, in these tests
PROGRAM = f"from blm_jax.evaluate.world import tasks; tasks.LIMITS = ({STEPS},) * 6; from blm_jax.cli import entry; entry()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_driver(tmp_path_factory.mktemp("driver") / "model"))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "LIMITS", (STEPS,) * len(tasks.TASKS))


def request(model: str, out: Path, *flags: str) -> list[str]:
    return ["eval", "world", model, *CELLS, "--out", str(out), *flags]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]


def in_processes(asked: list[str], count: int, devices: int) -> list[str]:
    """What each of them has said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    joined = [["--coordinator", coordinator, "--processes", str(count), "--process", str(i)] if count > 1 else [] for i in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *asked, *which],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for which in joined
    ]
    try:
        said = [process.communicate(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, [error[-2000:] for _, error in said]
    return [out for out, _ in said]


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    [said] = in_processes(request(model, out), 1, 1)
    assert "4 a cell" in said
    return out


def test_the_same_on_eight_devices(model: str, alone: Path, tmp_path: Path) -> None:
    rows = rows_of(alone)
    assert len({json.dumps(row["end"]) for row in rows}) == len(rows) == 16  # no two ended alike
    assert main(request(model, tmp_path / "eight", "--mesh", "data=8,fsdp=1")) == 0
    assert rows_of(tmp_path / "eight") == rows


def test_in_two_processes(model: str, alone: Path, tmp_path: Path) -> None:
    said = in_processes(request(model, tmp_path / "both", "--mesh", "data=8,fsdp=1", "--films", "1"), 2, 4)
    assert rows_of(tmp_path / "both") == rows_of(alone)
    assert len(list((tmp_path / "both" / "films").iterdir())) == 4 and (tmp_path / "both" / "films.png").exists()
    assert "a cell" in said[0] and not said[1]  # one of them speaks


def test_it_goes_on(model: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After half of it, and a line that was cut off."""
    half = tmp_path / "half"
    half.mkdir()
    (half / "request.json").write_bytes((alone / "request.json").read_bytes())
    lines = (alone / "episodes.jsonl").read_text().splitlines(keepends=True)
    (half / "episodes.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    assert main(request(model, half, "--mesh", "data=2,fsdp=4")) == 0
    assert rows_of(half) == rows_of(alone)
    result = json.loads((half / "world.json").read_text())
    assert result["all"]["episodes"] == 16 and [cell["episodes"] for cell in result["cells"]] == [4] * 4
    # Another request is not written beside it.
    for other in (["--steps", "1"], ["--dtype", "bfloat16"]):
        assert main(request(model, half, *other)) == 2
        assert "holds episodes of another request" in capsys.readouterr().err
    # Nor are lines read that are none.
    (half / "episodes.jsonl").write_text("{\n" + "".join(lines))
    assert main(request(model, half)) == 2
    assert "holds lines that are no JSON" in capsys.readouterr().err


def test_which_of_two_was_moved() -> None:
    begun = np.zeros((4, 2, 3))
    ended = begun.copy()
    ended[0, 1, 0], ended[1, 0, 1], ended[2, 1, 2] = 0.1, 0.1, 0.01  # the right one, the other, and neither, hardly
    ended[3, :, 0] = 0.05, 0.2  # both, the right one further
    np.testing.assert_array_equal(right_moved(begun, ended, np.array([1, 1, 1, 1])), [True, False, False, True])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["expert", "--robots", "pandas"], "the world has no robot 'pandas'; did you mean panda?"),
        (["expert", "--tasks", "Juggle"], "the world has no task 'Juggle'"),
        (["expert", "--tasks", "PickCube,PickCube"], "names a task twice"),
        (["expert", "--blind"], "expert neither sees, reads nor denoises"),
        (["nowhere"], "nowhere"),
        (["MODEL", "--shuffled"], "--shuffled names the other cube: give --two as well"),
        (["MODEL", "--shuffled", "--two", "--tasks", "PickCube,PlaceSphere"], "PlaceSphere has none: leave it out of --tasks"),
        (["MODEL", "--robots", "widowxai"], "does not drive world_widowxai"),
    ],
)
def test_requests_that_cannot_be(model: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "world", *[model if flag == "MODEL" else flag for flag in flags]]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
