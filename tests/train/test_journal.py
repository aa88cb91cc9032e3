"""What a run tells. The reader of event files is TensorBoard's own."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time as clocks
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blm_jax.errors import RequestError
from blm_jax.train import journal as journals
from blm_jax.train.goodput import Clock
from blm_jax.train.journal import Journal, cut
from blm_jax.train.work import StepWork
from tests.data import bucket

WORK = StepWork(rows=4, tokens=1000, operations={"decoder": 6000, "head": 2000}, repeated=2000)
KINDS = {"action/robot": ("panda", "xarm6", "xarm7")}


def values_of(step: int) -> dict[str, Any]:
    return {"loss": jnp.float32(1 / step), "learning_rate": jnp.float32(1e-4)}


def make(run: Any, begun: int = 0, total: int = 100, every: int = 1, **rest: Any) -> Journal:
    return Journal(run, begun=begun, total=total, every=every, clock=rest.pop("clock", None) or Clock(), **rest)


def go(run: Any, steps: range, **rest: Any) -> None:
    with make(run, begun=steps.start - 1, **rest) as journal:
        for step in steps:
            journal.log(step, values_of(step), WORK)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def told(run: Path, name: str = "loss") -> dict[int, float]:
    return {row["step"]: row[name] for row in rows(run) if name in row}


def events(run: Path) -> dict[str, dict[int, float]]:
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


# --- numbers ---------------------------------------------------------------------------------------------------------------


def test_rows_and_events_are_the_steps_asked_for_and_the_last(tmp_path: Path) -> None:
    go(tmp_path, range(1, 8), every=3, total=7)
    expected = {step: float(np.float32(1 / step)) for step in (3, 6, 7)}
    assert {step: np.float32(loss) for step, loss in told(tmp_path).items()} == expected
    found = events(tmp_path)
    assert found["loss"] == expected
    assert found.keys() == rows(tmp_path)[0].keys() - {"step", "time"}
    assert told(tmp_path, "learning_rate")[3] == 1e-4  # float32's shortest digits, not 9.999999747378752e-05


def test_numbers_are_kept_bit_for_bit(tmp_path: Path) -> None:
    drawn = (np.random.default_rng(0).standard_normal(200) * 10.0 ** np.arange(-20, 20).repeat(5)).astype(np.float32)
    with make(tmp_path, total=len(drawn)) as journal:
        for step, value in enumerate(drawn, start=1):
            journal.log(step, {"x": jnp.asarray(value), "n": jnp.int32(step), "half": jnp.bfloat16(0.1)}, WORK)
    np.testing.assert_array_equal(np.array(list(told(tmp_path, "x").values()), np.float32), drawn)
    np.testing.assert_array_equal(list(events(tmp_path)["x"].values()), drawn.astype(float))
    assert rows(tmp_path)[6]["n"] == 7 and jnp.bfloat16(rows(tmp_path)[0]["half"]) == jnp.bfloat16(0.1)


def test_means_of_what_was_seen(tmp_path: Path) -> None:
    """Sums and weights; what weighs nothing is left out, and is no NaN."""
    share = (jnp.array([6.0, 0.0, 1.0]), jnp.array([4.0, 0.0, 2.0]))
    with make(tmp_path, kinds=KINDS) as journal:
        journal.log(1, {"loss": (jnp.float32(3), jnp.float32(2)), "future": (jnp.float32(0), jnp.float32(0)), "action/robot": share}, WORK)
    row = rows(tmp_path)[0]
    assert (row["loss"], row["action/robot/panda"], row["action/robot/xarm7"]) == (1.5, 1.5, 0.5)
    assert "future" not in row and "action/robot/xarm6" not in row
    assert events(tmp_path)["action/robot/panda"] == {1: 1.5}


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    """It is told: null in JSON, which knows no NaN."""
    with make(tmp_path) as journal:
        journal.log(1, {"loss": jnp.float32(np.nan), "norm": jnp.float32(np.inf)}, WORK)
    line = (tmp_path / "log.jsonl").read_text()
    assert '"loss": null' in line and '"norm": null' in line
    assert np.isnan(events(tmp_path)["loss"][1])


def test_numbers_of_an_evaluation(tmp_path: Path) -> None:
    with make(tmp_path, every=5) as journal:
        journal.log(1, values_of(1), WORK)
        journal.tell(1, {"held_out/loss": 0.25})
        assert told(tmp_path, "held_out/loss") == {1: 0.25}  # at once
    assert "loss" not in rows(tmp_path)[0]


# --- in nobody's way ---------------------------------------------------------------------------------------------------------


def test_values_are_fetched_while_the_next_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    real = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda values: waited.append(float(values["step"])) or real(values))
    for process in (0, 1):  # the others write nothing, and are held back alike
        waited.clear()
        journal = make(tmp_path / str(process), process=process)
        for step in range(1, 4):
            journal.log(step, {"step": jnp.float32(step)}, WORK)
            assert waited == [*range(1, step)]
        journal.close()
        assert waited == [1, 2, 3]
    assert told(tmp_path / "0", "step") == {1: 1, 2: 2, 3: 3}
    assert not (tmp_path / "1").exists()


def test_it_takes_little_time(tmp_path: Path) -> None:
    """With thirty numbers a step, all of them told."""
    values = {f"loss/{i}": (jnp.float32(i), jnp.float32(2)) for i in range(30)}
    with make(tmp_path) as journal:
        journal.log(1, values, WORK)
        begin = clocks.process_time()
        for step in range(2, 52):
            journal.log(step, values, WORK)
        assert (clocks.process_time() - begin) / 50 < 0.02


def test_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves and evaluations are no part of a step's time; waiting for data is."""
    now = [0.0]

    def wait(values: Any) -> None:
        now[0] += 1.5  # the step itself, which runs on the devices meanwhile

    monkeypatch.setattr(jax, "block_until_ready", wait)
    clock = Clock(lambda: now[0])
    with make(tmp_path, every=2, total=8, clock=clock, peak=1e4) as journal:
        with clock.time("compile"):
            now[0] += 100
        for step in range(1, 9):
            with clock.time("data"):
                now[0] += 0.5
            with clock.step(step):
                journal.log(step, values_of(step), WORK)
            with clock.time("save"):
                now[0] += 50
    row = rows(tmp_path)[1]
    speeds = {name: row[name] for name in ("seconds_per_step", "data_wait", "rows_per_second", "tokens_per_second", "mfu", "hfu")}
    assert speeds == {
        "seconds_per_step": 2.0,
        "data_wait": 0.25,
        "rows_per_second": 2.0,
        "tokens_per_second": 500.0,
        "mfu": 8000 / 2.0 / 1e4,
        "hfu": 10000 / 2.0 / 1e4,
    }
    assert clock.seconds()["step"] == 12 and rows(tmp_path)[-1]["goodput"] == pytest.approx(12 / (100 + 8 * 52))


def test_the_clock_is_kept_with_the_journal(tmp_path: Path) -> None:
    """What was spent after the last row too: the last save, for one."""
    now = [0.0]
    clock = Clock(lambda: now[0])
    with make(tmp_path, every=2, clock=clock) as journal:
        for step in range(1, 4):
            journal.log(step, values_of(step), WORK)
        with clock.time("save"):
            now[0] += 7
    kept = Clock()
    kept.read(tmp_path)
    assert (kept.furthest, kept.starts, kept.seconds()["save"]) == (2, 2, 7)


def test_no_utilisation_where_the_chip_is_not_known(tmp_path: Path) -> None:
    go(tmp_path, range(1, 3))
    assert not {"mfu", "hfu"} & rows(tmp_path)[0].keys()
    assert {"tokens_per_second", "seconds_per_step", "data_wait", "goodput"} < rows(tmp_path)[0].keys()


# --- over restarts -----------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_reads_as_one(tmp_path: Path) -> None:
    """Told up to step 7, of which the last line is torn; the checkpoint is of step 4."""
    go(tmp_path, range(1, 8))
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    clock = Clock()
    clock.read(tmp_path)
    with make(tmp_path, begun=4, clock=clock) as journal:
        assert clock.furthest == 7
        assert told(tmp_path) == {step: pytest.approx(1 / step) for step in range(1, 5)}
        for step in range(5, 9):
            journal.log(step, {"loss": jnp.float32(step)}, WORK)
    expected = [1, 1 / 2, 1 / 3, 1 / 4, 5, 6, 7, 8]
    assert list(told(tmp_path)) == [*range(1, 9)] and list(told(tmp_path).values()) == pytest.approx(expected)
    assert events(tmp_path)["loss"] == pytest.approx(dict(enumerate(expected, start=1)))
    assert clock.seconds()["repeated"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goodput.json", "log.jsonl", "tensorboard"]


def test_a_run_that_has_no_checkpoint_yet_begins_anew(tmp_path: Path) -> None:
    go(tmp_path, range(1, 5))
    go(tmp_path, range(1, 3))
    assert list(told(tmp_path)) == [1, 2]


def test_a_log_that_ends_where_the_run_goes_on_is_left_as_it_is(tmp_path: Path) -> None:
    go(tmp_path, range(1, 5))
    before = (tmp_path / "log.jsonl").stat()
    assert cut(tmp_path / "log.jsonl", 4) == 4
    assert (tmp_path / "log.jsonl").stat() == before


LINES = [json.dumps({"step": step, "loss": 1 / step, "note": "ä"}).encode() + b"\n" for step in (1, 2, 3, 5, 8, 13)]


@given(end=st.integers(0, sum(map(len, LINES))), begun=st.integers(0, 14), junk=st.binary(max_size=8))
def test_wherever_a_kill_tears_it_all_whole_lines_are_kept(tmp_path_factory: Any, end: int, begun: int, junk: bytes) -> None:
    log = tmp_path_factory.mktemp("cut") / "log.jsonl"
    torn = b"".join(LINES)[:end]
    log.write_bytes(torn + junk.replace(b"\n", b""))
    whole = torn.count(b"\n")
    furthest = cut(log, begun)
    kept = [line for line in LINES[:whole] if json.loads(line)["step"] <= begun]
    assert log.read_bytes() == b"".join(kept)
    assert furthest == max((json.loads(line)["step"] for line in LINES[:whole]), default=0)


def test_what_was_told_before_a_failure_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError), make(tmp_path) as journal:
        for step in range(1, 4):
            journal.log(step, values_of(step), WORK)
        raise FloatingPointError
    assert list(told(tmp_path)) == list(events(tmp_path)["loss"]) == [1, 2, 3]


def test_what_was_told_before_a_kill_is_kept(tmp_path: Path) -> None:
    code = f"""
import os, jax.numpy as jnp
from tests.train.test_journal import *
journal = make({str(tmp_path)!r})
for step in range(1, 6):
    journal.log(step, values_of(step), WORK)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONPATH": "."}, check=False)
    assert ended.returncode == -9
    assert list(told(tmp_path)) == list(events(tmp_path)["loss"]) == [1, 2, 3, 4]  # the fifth was still running


# --- elsewhere -------------------------------------------------------------------------------------------------------------


def test_a_journal_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is appended to: files are copied whole, now and then and at the end."""
    place = bucket.use(monkeypatch, tmp_path)
    run = f"{bucket.ROOT}/run"
    go(run, range(1, 5))
    monkeypatch.setattr(journals, "UPLOAD_SECONDS", 0)
    with make(run, begun=2) as journal:
        for step in range(3, 6):
            journal.log(step, {"loss": jnp.float32(step)}, WORK)
            steps = [json.loads(line)["step"] for line in place.objects["bucket/run/log.jsonl"].splitlines()]
            assert steps == ([1, 2, 3, 4] if step == 3 else [*range(1, step)])
        place.full = True
        journal.flush()  # which is no reason to end a run
        place.full = False
    copied = tmp_path / "copied"
    for name, contents in place.objects.items():
        file = copied / name.removeprefix("bucket/run/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents)
    assert list(told(copied)) == [1, 2, 3, 4, 5] and list(events(copied)["loss"].values()) == [1, 0.5, 3, 4, 5]
    assert json.loads((copied / "goodput.json").read_text())["furthest"] == 5


class Wandb:
    """In place of the package: what it was asked for."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.rows: list[Mapping[str, Any]] = []
        self.steps: list[tuple[str, str]] = []
        self.ended = 0

    def init(self, **asked: Any) -> Wandb:
        self.started.append(asked)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps.append((name, step_metric))

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.ended += 1


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", there)
    go(tmp_path, range(1, 3), wandb="arms", config={"steps": 7})
    go(tmp_path, range(2, 4), wandb="arms")
    go(tmp_path / "other", range(1, 2), wandb="arms")
    go(tmp_path, range(1, 2))  # not asked for
    assert [row["step"] for row in there.rows] == [1, 2, 2, 3, 1] and there.ended == 3
    assert there.steps == [("*", "step")] * 3
    first, second, other = there.started
    assert first["id"] == second["id"] != other["id"]
    assert (first["project"], first["name"], first["config"], first["resume"]) == ("arms", tmp_path.name, {"steps": 7}, "allow")


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RequestError, match=r"wandb is not installed: pip install 'blm-jax\[wandb\]'"):
        make(tmp_path / "run", wandb="arms")
    assert not (tmp_path / "run").exists()
    make(tmp_path / "run", wandb="arms", process=1).close()  # only process 0 tells


# --- who watches -------------------------------------------------------------------------------------------------------------


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, range(1, 7), every=3, total=9000, peak=1e12)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 2
    for part in ("step 3/9000  loss 0.3333  rate 1.00e-04  tokens/s ", "  MFU ", "  data wait 0.0%  ETA "):
        assert part in lines[0]


def test_an_evaluation_is_shown_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(tmp_path, total=7) as journal:
        journal.tell(3, {"held_out/loss": 0.25, "held_out/loss/panda": math.nan})
    assert capsys.readouterr().err == "step 3/7  held_out/loss 0.25  held_out/loss/panda nan\n"


def test_other_processes_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, range(1, 4), process=1)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    go(tmp_path, range(5, 9), total=8, every=2)
    shown = screen.getvalue().split("\r")[-1]
    assert "8/8" in shown and "step/s" in shown and "\n" not in screen.getvalue()[:-1]
    assert "loss 0.125" in shown
