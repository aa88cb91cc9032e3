"""`blm train` from files to files: what it tells, what it keeps, how it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blm_jax.cli import main
from blm_jax.config import HardwareConfig, MeshConfig
from blm_jax.errors import RequestError, RunError
from blm_jax.models.mllm import abstract_params
from blm_jax.recipe import CheckpointConfig, EvaluationConfig, ModuleConfig, OptimizerConfig, Run
from blm_jax.train.command import train_run
from blm_jax.train.select import rates
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.load import load_params
from blm_jax.weights.names import leaves
from blm_jax.weights.source import read_config
from tests.conftest import ROOT
from tests.train.worlds import OWN, World, make_world, rows_of, write

STEPS = 30  # of Stage II


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def losses_of(out: Path, name: str = "action") -> dict[int, float]:
    return {row["step"]: row[name] for row in rows_of(out)}


@pytest.fixture(scope="module")
def expected(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage II, to its end without a stop."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_run(world.stage_two(out))
    return out


def arrays(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "contents.json").read_text())["arrays"]


def test_stage_two_learns_and_leaves_its_base_alone(world: World, expected: Path) -> None:
    before = fingerprint(world.model)
    told = losses_of(expected)
    assert list(told) == list(range(1, STEPS + 1)) and all(np.isfinite(value) for value in told.values())
    rows = rows_of(expected)
    future = [row["future"] for row in rows if "future" in row]
    assert future[-1] < 0.7 * future[0]
    assert {name for row in rows for name in row if name.startswith("action/")} >= {"action/robot/small", "action/robot/my_arm"}
    assert {name for row in rows for name in row if name.startswith("action/task")} == {f"action/task/{one.path}" for one in world.sets()}
    assert fingerprint(world.model) == before
    assert sorted(int(path.name) for path in (expected / "checkpoints").iterdir()) == [24, 27, 30]
    provenance = json.loads((expected / "checkpoints" / str(STEPS) / "provenance.json").read_text())
    assert provenance["base"]["fingerprint"] == before


def test_moments_are_of_what_is_trained_alone(expected: Path) -> None:
    kept = arrays(expected / "checkpoints" / str(STEPS))
    trained = {path: entry["shape"] for path, entry in kept["params"].items()}
    assert trained and all(path.startswith("policy.") for path in trained)
    size = sum(int(np.prod(shape)) for shape in trained.values())
    for moment in ("mean", "square"):
        found = [entry["shape"] for path, entry in kept["state"].items() if f".{moment}." in path]
        assert sum(int(np.prod(shape)) for shape in found) == size


def test_it_stops_when_asked_and_goes_on_exactly(world: World, expected: Path, tmp_path: Path) -> None:
    """SIGTERM comes in the middle of the run; at most the step at work is lost, and the end is that of a run without a stop."""
    run = world.stage_two(tmp_path / "run", checkpoints=CheckpointConfig(every=100))
    seen: list[int] = []

    def stop_at(step: int) -> None:
        seen.append(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    from blm_jax.train import loop

    with pytest.MonkeyPatch.context() as patch:
        whole = loop.values
        patch.setattr(loop, "values", lambda report: stop_at(len(seen) + 1) or whole(report))
        result = train_run(run)
    assert result["stopped"] and result["step"] == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
    result = train_run(run)
    assert not result["stopped"] and result["step"] == STEPS
    assert losses_of(tmp_path / "run") == losses_of(expected)
    assert arrays(tmp_path / "run" / "checkpoints" / str(STEPS)) == arrays(expected / "checkpoints" / str(STEPS))


def test_it_goes_on_on_another_mesh(world: World, expected: Path, tmp_path: Path) -> None:
    run = world.stage_two(tmp_path / "run", checkpoints=CheckpointConfig(every=20))
    assert train_run(run)["step"] == STEPS
    (tmp_path / "run" / "checkpoints" / str(STEPS) / "commit_success.txt").unlink()  # as if it was stopped before
    wide = replace(run, hardware=HardwareConfig(mesh=MeshConfig(data=1, fsdp=2, tensor=2)))
    result = train_run(wide)
    assert result["step"] == STEPS and result["starts"] == 2 and result["shares"]["repeated"] > 0
    for step, loss in losses_of(expected).items():
        assert losses_of(tmp_path / "run")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_kills_leave_no_trace(world: World, tmp_path: Path, kills: int) -> None:
    """kill -9 at so many moments, saves among them: what goes on ends bit for bit where a run without a kill does."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.train.nursery"],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as nursery:
        assert nursery.stdin and nursery.stdout

        def start(name: str, steps: int = 0, seconds: float = 0.0) -> int:
            run = world.stage_two(tmp_path / name, checkpoints=CheckpointConfig(every=2, keep=2))
            arguments = ["train", str(write(run, tmp_path / f"{name}.yaml")), "--processes", "1"]
            print(json.dumps({"arguments": arguments, "steps": steps, "seconds": seconds}), file=nursery.stdin, flush=True)
            return int(nursery.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]

        rng, reached = np.random.default_rng(0), []
        for _ in range(kills):
            assert start("killed", int(rng.integers(1, 6)), rng.uniform(0, 0.1)) == -signal.SIGKILL
            reached.append(max((int(path.parent.name) for path in finished(tmp_path / "killed")), default=0))
        assert start("killed") == 0 and start("whole") == 0
        nursery.stdin.close()
    assert reached == sorted(reached) and any(reached), reached
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert arrays(tmp_path / "killed" / "checkpoints" / str(STEPS)) == arrays(tmp_path / "whole" / "checkpoints" / str(STEPS))


def finished(run: Path) -> list[Path]:
    return list(run.glob("checkpoints/*/commit_success.txt"))


# --- Stage I -------------------------------------------------------------------------------------------------------------------


def test_stage_one_learns_what_is_not_frozen(world: World, tmp_path: Path) -> None:
    frozen = (ModuleConfig("vision.*", 0.0), ModuleConfig("decoder.embed.*", 0.0))  # so no slopes are found below the kept block
    optimizer = OptimizerConfig(rate=3e-3, modules=(*frozen, ModuleConfig("decoder.blocks.q.*", 0.5)))
    run = world.stage_one(tmp_path / "run", optimizer=optimizer, evaluation=EvaluationConfig(every=4, batches=2))
    assert run.stage_one is not None
    stage_one = replace(run.stage_one, held_out=run.stage_one.corpora, kept_blocks=1)
    run = replace(run, stage_one=stage_one, checkpoints=CheckpointConfig(best="held_out/loss"))
    result = train_run(run)
    told = losses_of(tmp_path / "run", "loss")
    assert result["step"] == 8 and told[8] < told[1] - 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    held_out = [row["held_out/loss"] for row in rows if "held_out/loss" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    assert f"corpus/{world.folder / 'corpus'}" in rows[0]
    kept = arrays(tmp_path / "run" / "checkpoints" / "8")["params"]
    assert not [path for path in kept if path.startswith("vision.")] and [path for path in kept if path.startswith("decoder.")]
    after = blocks_of(str(tmp_path / "run"))
    for path, before in blocks_of(world.model).items():
        np.testing.assert_array_equal(after[path][0], before[0])
        assert (after[path][1] != before[1]).any(), path
    with pytest.raises(RequestError, match="kept_blocks is 2: the decoder has 2 blocks, and one at least has to learn"):
        train_run(replace(run, out=str(tmp_path / "none"), stage_one=replace(stage_one, kept_blocks=2)))


def blocks_of(model: str) -> dict[tuple[str, ...], np.ndarray]:
    params = load_params(model, abstract_params(read_config(model)))
    return {path: np.asarray(leaf) for path, leaf in leaves(params["decoder"]["blocks"])}


# --- what is refused -----------------------------------------------------------------------------------------------------------


def test_patterns_that_match_nothing_are_refused(world: World, tmp_path: Path) -> None:
    modules = (ModuleConfig("polcy.bridge.*", 0.0),)
    with pytest.raises(RequestError, match=r"'polcy\.bridge\.\*' matches no parameter; did you mean policy\.bridge\?"):
        train_run(world.stage_two(tmp_path / "run", optimizer=OptimizerConfig(rate=1e-3, modules=modules)))
    with pytest.raises(RequestError, match="freezes every parameter"):
        train_run(world.stage_two(tmp_path / "run", optimizer=OptimizerConfig(rate=1e-3, modules=(ModuleConfig("*", 0.0),))))
    assert rates(["a.b", "a.c"], [ModuleConfig("a.b", 0.5), ModuleConfig("a.*", 0.0)]) == {"a.b": 0.5, "a.c": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": ""}, "base is missing: say from which MODEL"),
        ({"out": ""}, "out is missing: say where"),
        ({"batch": 3, "hardware": HardwareConfig(rows_at_once=2)}, "rows_at_once is 2: it must divide 3"),
    ],
)
def test_wrong_runs_are_refused(world: World, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train_run(replace(world.stage_two(tmp_path / "run"), **changes))


def test_another_run_does_not_go_on_here(world: World, expected: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    seldom = world.stage_two(expected)
    assert seldom.stage_two is not None
    others = {"seed": world.stage_two(expected, seed=1), "stage_two.every": replace(seldom, stage_two=replace(seldom.stage_two, every=2))}
    for what, other in others.items():
        assert main(["train", str(write(other, tmp_path / "other.yaml"))]) == 2
        assert f"is of another run: {what} differ" in capsys.readouterr().err


def test_steps_that_are_not_finite_are_skipped_and_stop_the_run(world: World, tmp_path: Path) -> None:
    run = world.stage_two(tmp_path / "run", optimizer=OptimizerConfig(rate=1e30, clip=1e30, schedule="constant", warmup=0.0, skips=3))
    with pytest.raises(RunError, match=r"the last 3 steps, up to .*, were not finite"):
        train_run(run)
    assert rows_of(tmp_path / "run")[-1]["skipped"] >= 1


def test_policy_is_needed(world: World, tmp_path: Path) -> None:
    run: Run = world.stage_two(tmp_path / "run", policy=None)
    with pytest.raises(RequestError, match=r"stage_two.policy is missing, and .* has no policy/ to go on with"):
        train_run(run)
    assert OWN.robots == ("small", "my_arm")
