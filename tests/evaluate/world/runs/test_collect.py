"""`blm data collect world`: sets that training reads, whose actions do again what was done; and requests that are refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blm_jax.cli import main
from blm_jax.data.demos.robots import load_robots
from blm_jax.data.demos.sets import open_set, read_episode, read_pictures
from blm_jax.evaluate.world import physics, tasks, view
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.runs import cells, collect
from blm_jax.evaluate.world.scene import BOX

SEED, EPISODES = 4, 3  # the third begins in the midst
ROBOT, TASK = "xarm6", "PushCube"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without noise, so that what was recorded is what was done."""
    out = tmp_path_factory.mktemp("collected") / "sets"
    flags = ["--robots", ROBOT, "--tasks", TASK, "--episodes", str(EPISODES), "--seed", str(SEED), "--noise", "0"]
    assert main(["data", "collect", "world", str(out), *flags]) == 0
    return out


def test_what_was_recorded_is_done_again(collected: Path) -> None:
    robot = load_robots()[f"world_{ROBOT}"]
    source = open_set(str(collected / robot.name))
    assert source.count == EPISODES == json.loads((collected / "collected.json").read_text())["yield"][0]["episodes"]
    beginnings = cells.episodes_of((ROBOT,), (TASK,), 8)
    settings, states = cells.begin(np.uint32(SEED), *beginnings, kind=cells.DEMONSTRATION, two=False)
    step = jax.jit(lambda setting, state, action: (physics.step(setting, state, action), tasks.succeeded(setting, state)))
    for number in range(2):
        episode = read_episode(source, robot, number)
        # The beginnings of attempts, in order: those that failed are left out.
        fits = np.flatnonzero(np.abs(np.asarray(states.joints)[:, :6] - episode.state[0, :6]).max(axis=1) < 1e-6)
        assert len(fits) == 1
        setting, state = (jax.tree.map(lambda x, row=int(fits[0]): x[row], tree) for tree in (settings, states))
        shown = np.asarray(view.pictures(jax.tree.map(lambda x: x[None], view.shapes(setting, state))))[0]
        for camera, picture in zip(view.CAMERAS, shown, strict=True):
            np.testing.assert_array_equal(read_pictures(source, robot, number, camera, [0])[0], picture)
        held = 0
        for row, action in zip(episode.state, episode.action, strict=False):
            np.testing.assert_allclose(np.append(state.joints[:6], state.opening), row, atol=1e-4)
            state, good = step(setting, state, np.concatenate([action[:6], [0], action[6:]]).astype(np.float32))
            held = held + 1 if good else 0
        assert held >= 9 and bool(tasks.succeeded(setting, state))  # it ends half a second after it had succeeded
        assert len(episode.action) < tasks.LIMITS[tasks.TASKS.index(TASK)]


def test_most_recordings_begin_in_the_midst(collected: Path) -> None:
    """Where no episode begins, with the expert's way on from there, and not with the jolt that came before."""
    robot = load_robots()[f"world_{ROBOT}"]
    source = open_set(str(collected / robot.name))
    _, states = cells.begin(np.uint32(SEED), *cells.episodes_of((ROBOT,), (TASK,), 8), kind=cells.DEMONSTRATION, two=False)

    def off(number: int) -> float:
        """How far the joints are from those of any beginning."""
        return float(np.abs(np.asarray(states.joints)[:, :6] - read_episode(source, robot, number).state[0, :6]).max(axis=1).min())

    assert max(off(0), off(1)) < 1e-6 and off(2) > 0.05
    episode = read_episode(source, robot, 2)
    missed = np.abs(episode.state[1:-1, :6] - episode.action[: len(episode.state) - 2, :6]).max(axis=1)
    assert missed[0] < 1e-3 and np.median(missed) < 1e-3
    assert len(episode.action) >= collect.FEWEST


def test_cameras_may_look_less_often_than_arms_move(collected: Path, tmp_path: Path) -> None:
    """What they saw is shown until they look again; all else is as it was. So many of another task come behind."""
    of_tasks = ["--tasks", f"{TASK},PullCube", "--episodes", f"{EPISODES},1"]
    flags = ["--robots", ROBOT, *of_tasks, "--seed", str(SEED), "--noise", "0", "--every", "4"]
    assert main(["data", "collect", "world", str(tmp_path / "sets"), *flags]) == 0
    cells_of = json.loads((tmp_path / "sets" / "collected.json").read_text())["yield"]
    assert [(cell["task"], cell["episodes"]) for cell in cells_of] == [(TASK, EPISODES), ("PullCube", 1)]
    robot = load_robots()[f"world_{ROBOT}"]
    assert open_set(str(tmp_path / "sets" / robot.name)).count == EPISODES + 1
    for number in range(EPISODES):
        often, seldom = (open_set(str(path / robot.name)) for path in (collected, tmp_path / "sets"))
        one, other = (read_episode(source, robot, number) for source in (often, seldom))
        np.testing.assert_array_equal(one.state, other.state)
        np.testing.assert_array_equal(one.action, other.action)
        steps = list(range(len(one.state)))
        for camera in robot.cameras:
            all_of, some = (read_pictures(source, robot, number, camera.name, steps) for source in (often, seldom))
            assert any((all_of[i] != all_of[i // 4 * 4]).any() for i in steps)
            for i in steps:
                np.testing.assert_array_equal(some[i], all_of[i // 4 * 4])


def test_noise_is_done_and_not_recorded(collected: Path, tmp_path: Path) -> None:
    flags = ["--robots", ROBOT, "--tasks", TASK, "--episodes", "1", "--seed", str(SEED), "--noise", "0.01"]
    assert main(["data", "collect", "world", str(tmp_path / "sets"), *flags]) == 0
    robot = load_robots()[f"world_{ROBOT}"]
    quiet, noisy = (read_episode(open_set(str(path / robot.name)), robot, 0) for path in (collected, tmp_path / "sets"))

    def missed(episode: Any) -> float:
        """How far joints are, a step later, from where the recorded action wanted them."""
        return float(np.median(np.abs(episode.state[1:-1, :6] - episode.action[: len(episode.state) - 2, :6]).max(axis=1)))

    assert missed(quiet) < 1e-3 < missed(noisy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_so_many_have_two_cubes(share: float) -> None:
    numbers = np.arange(40)
    two = collect.have_two(numbers, share)
    for first in (0, 10, 30):
        assert two[first : first + 10].sum() == round(10 * share)
    pairs = cells.episodes_of((ROBOT,), tasks.TASKS[:3], 40)
    settings, _ = cells.begin(np.uint32(0), *pairs, kind=cells.DEMONSTRATION, two=np.tile(two, 3))
    np.testing.assert_array_equal((np.asarray(settings.kind) == BOX).sum(axis=1), 1 + np.tile(two, 3))
    assert not np.asarray(settings.wanted)[~np.tile(two, 3)].any()
    assert share == 0 or 0.2 < np.asarray(settings.wanted)[np.tile(two, 3)].mean() < 0.8


def test_demonstrations_are_no_evaluations() -> None:
    episodes = cells.episodes_of(ROBOTS, tasks.TASKS, 1)
    one, other = (cells.begin(np.uint32(0), *episodes, kind=kind, two=False)[1] for kind in (cells.DEMONSTRATION, cells.EVALUATION))
    assert (np.abs(np.asarray(one.position[:, 0] - other.position[:, 0])).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise", "nan"], "noise is nan: it must lie between 0 and 0.2 radians"),
        (["--noise", "-0.1"], "noise is -0.1: it must lie between"),
        (["--seed", "-1"], "seed is -1: it must lie between"),
        (["--two", "half"], "'half' is no share: write 1% or 0.01"),
        (["--every", "0"], "--every"),
        (["--episodes", "many"], "'many' are no numbers: write 50, or one for each task: 9,5,5"),
        (["--episodes", "2,0"], "0 is not at least 1"),
        (["--tasks", "PickCube,PushCube", "--episodes", "1,2,3"], "give one number, or one for each of PickCube, PushCube"),
        (["--robots", "pandas"], "did you mean panda?"),
    ],
)
def test_requests_that_cannot_be(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "collect", "world", str(tmp_path / "sets"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
