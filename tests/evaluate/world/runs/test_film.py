"""`blm eval world --films`: what is seen of the first episodes, which are those of the table; and requests that are refused in a line."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

from blm_jax.cli import main
from blm_jax.evaluate.world import tasks, view
from blm_jax.evaluate.world.render import project
from blm_jax.evaluate.world.runs import cells, film, rollout
from blm_jax.evaluate.world.view import SIZE

ROBOT, TASKS, SEED = "xarm6", ("PushCube", "PullCube"), 1
FLAGS = ["eval", "world", "expert", "--robots", ROBOT, "--tasks", ",".join(TASKS), "--episodes", "4", "--seed", str(SEED)]


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """All runs of this file have the same expert."""
    make, expert = rollout.make_turn, rollout.Expert()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "Expert", lambda: expert)
        patch.setattr(rollout, "make_turn", functools.cache(make))
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("filmed") / "out"
    assert main([*FLAGS, "--out", str(out), "--films", "1"]) == 0
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]


def frames_of(path: Path) -> tuple[np.ndarray, list[int]]:
    """[frames, height, width, 3] as small as they were drawn, and for how many milliseconds each is seen."""
    with Image.open(path) as moving:
        assert moving.info["loop"] == 0 and moving.size == ((2 * SIZE + 2) * film.LARGER, SIZE * film.LARGER)
        shown = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(moving)]
    large = np.stack([pixels for pixels, _ in shown])
    small = large[:, :: film.LARGER, :: film.LARGER]
    np.testing.assert_array_equal(small.repeat(film.LARGER, axis=1).repeat(film.LARGER, axis=2), large)
    return small, [duration for _, duration in shown]


def test_what_is_written(out: Path) -> None:
    result = json.loads((out / "world.json").read_text())
    first = [row for row in rows_of(out) if row["episode"] == 0]
    paths = [out / "films" / f"{ROBOT}_{task}_0.gif" for task in TASKS]
    assert sorted((out / "films").iterdir()) == sorted(paths)
    told = [{name: row[name] for name in ("robot", "task", "episode", "success")} for row in first]
    assert result["films"] == [{**one, "path": str(path)} for one, path in zip(told, paths, strict=True)]
    assert result["sheet"] == str(out / "films.png")
    with Image.open(out / "films.png") as sheet:
        assert sheet.size == (film.LABEL + film.AT_A_GLANCE * (SIZE + 2) - 2, 2 * (SIZE + 2) - 2)
    assert "films" not in json.loads((out / "request.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_what_is_seen(out: Path, task: str) -> None:
    """The beginning as the cameras see it; then the cube goes where it is to go, and the film ends soon after."""
    [row] = [row for row in rows_of(out) if (row["task"], row["episode"]) == (task, 0)]
    frames, durations = frames_of(out / "films" / f"{ROBOT}_{task}_0.gif")
    # Frames that show the same are one that is seen for longer.
    last = row["steps"] - 1 + rollout.HELD + film.AFTER
    assert row["success"] and sum(durations) == 100 * (last // film.EVERY) + 1000

    settings, states = cells.begin(np.uint32(SEED), *cells.episodes_of((ROBOT,), (task,), 1), kind=cells.EVALUATION, two=False)
    seen = view.tiled(np.asarray(view.pictures(jax.vmap(view.shapes)(settings, states))))
    off = np.abs(frames[0].astype(int) - seen)
    assert off.mean() < 2 and off.max() <= 30  # a film has but so many colours

    colour = np.asarray(settings.colour)[0, 0]
    side = frames[[0, -1], :, SIZE + 2 :].astype(float)
    alike = side @ colour / np.linalg.norm(side, axis=-1) / np.linalg.norm(colour)
    columns = [np.nonzero(one > 0.99)[1] for one in alike]
    assert min(map(len, columns)) > 5
    # Where the cube was and where the table says that it was left, as the camera has it.
    places = np.stack([np.asarray(states.position)[0, 0], row["end"]]).astype(np.float32)
    wanted, _ = project(view.CAMERAS["side"], places, SIZE)
    assert np.abs([one.mean() + 0.5 for one in columns] - wanted[:, 0]).max() < 1
    assert (wanted[1, 0] > wanted[0, 0]) == (task == "PushCube")


def test_only_what_lacks_is_filmed(out: Path) -> None:
    lacks, there = [out / "films" / f"{ROBOT}_{task}_0.gif" for task in TASKS]
    contents, table = lacks.read_bytes(), (out / "episodes.jsonl").read_text()
    lacks.unlink()
    before = [path.stat().st_mtime_ns for path in (there, out / "films.png")]
    # A film that shows another episode than the table tells of is none.
    wrong = rows_of(out)
    wrong[0]["end"][0] += 1e-6
    (out / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    assert main([*FLAGS, "--out", str(out), "--films", "1"]) == 1
    (out / "episodes.jsonl").write_text(table)
    assert not lacks.exists()
    assert main([*FLAGS, "--out", str(out), "--films", "1"]) == 0
    assert lacks.read_bytes() == contents
    assert [path.stat().st_mtime_ns for path in (there, out / "films.png")] == before


def test_a_failure_is_shown_whole() -> None:
    limit = tasks.LIMITS[tasks.PULL]
    assert film.end_of({"task": "PullCube", "success": False}, 3) == limit
    assert film.end_of({"task": "PullCube", "success": True}, rollout.HELD) == limit
    assert film.end_of({"task": "PullCube", "success": True}, 30) == limit - 30 + rollout.HELD + film.AFTER


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--films", "1"], "--films are written beside the table: give --out DIR as well"),
        (["--films", "5", "--out", "OUT"], "--films 5 is more than a cell has: it has --episodes 4"),
        (["--films", "0", "--out", "OUT"], "0 is not at least 1"),
    ],
)
def test_requests_that_cannot_be(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, *[str(tmp_path / "out") if flag == "OUT" else flag for flag in flags]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
