"""`blm eval openloop`: each number against NumPy and policies whose actions are known, on any mesh, compiled once; files and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blm_jax.cli import main
from blm_jax.config import HardwareConfig, MeshConfig
from blm_jax.data.demos import robots
from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.recorder import Recorder
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.statistics import Statistics, from_arrays
from blm_jax.errors import RequestError
from blm_jax.evaluate.openloop import ROWS, Request, openloop
from blm_jax.evaluate.scores import Truth, errors, forecasts, plain
from blm_jax.infer.act import Actor, denoise, look, noise_of
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.policy import PolicyFiles, write_policy
from tests.convert.policy_dirs import make_params
from tests.data.demos.recordings import record, write
from tests.data.demos.stage_two import ARM, POLICY, ROBOTS, SMALL
from tests.tiny_model import write_tiny_model

CONFIG = replace(POLICY, robots=("small", "my_arm"))
LENGTHS = {"small": [5, 2, 10], "my_arm": [6, 3]}  # chunks have 3 and 4 steps, of which 1 and 2 are executed


@dataclass(frozen=True)
class World:
    """Recorded episodes, and a policy that says nothing of how noise should move: its actions are its noise."""

    folder: Path
    recordings: dict[str, list[Recording]]
    statistics: dict[str, Statistics]

    def ask(self, robot: Robot, **settings: Any) -> dict[str, Any]:
        return openloop(Request(str(self.folder / "model"), (str(self.folder / robot.name),), robot.name, **settings))

    def flags(self, *more: str) -> list[str]:
        return ["eval", "openloop", str(self.folder / "model"), str(self.folder / "small"), "--robot", "small", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    recordings = {name: write_episodes(folder / name, robot) for name, robot in ROBOTS.items()}
    statistics = {name: learned(robot, recordings[name]) for name, robot in ROBOTS.items()}
    model = write_tiny_model(folder / "model")
    params = make_params(CONFIG)
    params["embodiments"]["decode_outer"] = jax.tree.map(np.zeros_like, params["embodiments"]["decode_outer"])
    write_policy(model / "policy", PolicyFiles(CONFIG, ROBOTS, statistics, fingerprint(model)), params)
    (folder / "robots.yaml").write_text(robots.render(ROBOTS))
    return World(folder, recordings, statistics)


def write_episodes(path: Path, robot: Robot) -> list[Recording]:
    """Instructions are of very different lengths."""
    made = [
        replace(record(robot, length, i), instruction="do it" + i * " and then once more") for i, length in enumerate(LENGTHS[robot.name])
    ]
    with Recorder(path, robot, "rlds") as recorder:
        for one in made:
            recorder.add(one)
    return made


def learned(robot: Robot, recordings: Sequence[Recording]) -> Statistics:
    found = [windows(one, robot, 1) for one in recordings]
    states, chunks, masks = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return from_arrays(robot, states, np.where(masks[..., None], chunks, 0), masks)


def windows(one: Recording, robot: Robot, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, chunks and masks of an episode, step by step; NaN past its end."""
    states, chunks, masks = [], [], []
    for step in range(0, len(one.action), every):
        chunk = np.full((robot.horizon, one.action.shape[1]), np.nan)
        left = one.action[step : step + robot.horizon]
        chunk[: len(left)] = left
        states.append(one.state[step].astype(np.float64))
        chunks.append(chunk)
        masks.append(np.arange(robot.horizon) < len(left))
    return np.stack(states), np.stack(chunks), np.stack(masks)


def all_windows(world: World, robot: Robot, every: int) -> tuple[np.ndarray, np.ndarray]:
    """States and chunks of all episodes."""
    parts = [windows(one, robot, every)[:2] for one in world.recordings[robot.name]]
    states, chunks = zip(*parts, strict=True)
    return np.concatenate(states), np.concatenate(chunks)


def numbers(result: dict[str, Any], robot: Robot, way: str) -> tuple[np.ndarray, ...]:
    """Errors over all steps, and by step: MAE and RMSE [dims], MAE and RMSE [horizon, dims], in the robot's units."""
    found = result["robots"][robot.name]["errors"][way]
    names = [dimension.name for dimension in robot.action]
    flat = [np.array([found["dimensions"][name][key] for name in names], float) for key in ("mae", "rmse")]
    return *flat, *(np.array(found["horizon"][key], float) for key in ("mae", "rmse"))


def expected(off: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same of differences [..., horizon, dims], NaN where nothing was done."""
    flat = off.reshape(-1, *off.shape[-2:])
    mae, square = (np.nanmean(values, axis=0) for values in (np.abs(flat), flat**2))
    return np.nanmean(np.abs(flat), axis=(0, 1)), np.sqrt(np.nanmean(flat**2, axis=(0, 1))), mae, np.sqrt(square)


def assert_numbers(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], rtol: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-7)


def decoded(world: World, robot: Robot, states: np.ndarray, said: np.ndarray) -> np.ndarray:
    """What is meant by [moments, samples, horizon, dims] of normalised actions, by hand: quantiles, then relative joints, then limits."""
    summary = world.statistics[robot.name].action
    low, high = np.array(summary.q01), np.array(summary.q99)
    chunks = (low + high) / 2 + said * (high - low) / 2
    for i, dimension in enumerate(robot.action):
        if dimension.kind == "joint":
            chunks[..., i] += states[:, i, None, None]
        chunks[..., i] = np.clip(chunks[..., i], dimension.low, dimension.high)
    return chunks


# --- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("robot", "every"), [(SMALL, None), (ARM, 1)], ids=["small", "my_arm"])
def test_baselines(world: World, robot: Robot, every: int | None) -> None:
    result = world.ask(robot, every=every)
    states, done = all_windows(world, robot, every or robot.executed)
    told = result["robots"][robot.name]
    assert (told["episodes"], told["moments"]) == (len(LENGTHS[robot.name]), len(states))
    assert told["actions"] == np.isfinite(done[..., 0]).sum()

    for part in numbers(result, robot, "replay"):
        assert (part == 0).all()
    assert_numbers(numbers(result, robot, "hold"), expected(states[:, None] - done))
    relative = done - np.where([dimension.kind == "joint" for dimension in robot.action], states[:, None], 0)
    _, chunks = all_windows(world, robot, 1)
    learned_from = chunks - np.where([one.kind == "joint" for one in robot.action], all_windows(world, robot, 1)[0][:, None], 0)
    center = np.nanmean(learned_from, axis=(0, 1))
    low, high = (np.array([getattr(one, side) for one in robot.action]) for side in ("low", "high"))
    assert_numbers(numbers(result, robot, "mean"), expected(np.clip(center + (done - relative), low, high) - done))


def test_a_policy_whose_actions_are_its_noise(world: World) -> None:
    """More moments than a batch has rows: each has noise of its own, decoded to absolute actions."""
    result = world.ask(SMALL, samples=2, seed=3)
    states, done = all_windows(world, SMALL, 1)
    assert len(states) > ROWS
    noise = np.asarray(noise_of(3, len(states), 2, CONFIG)).reshape(len(states), 2, CONFIG.horizon, -1)
    made = decoded(world, SMALL, states, noise[:, :, : SMALL.horizon, : len(SMALL.action)].astype(np.float64))
    assert_numbers(numbers(result, SMALL, "policy"), expected(made - done[:, None]))
    assert_numbers(numbers(result, SMALL, "mean of 2"), expected(made.mean(axis=1) - done))
    summary = world.statistics["small"].action
    size = np.array(summary.q99) - np.array(summary.q01)
    nearest = np.nansum(np.abs(made - done[:, None]) / size, axis=(2, 3)).argmin(axis=1)
    assert set(nearest) == {0, 1}
    assert_numbers(numbers(result, SMALL, "best of 2"), expected(made[np.arange(len(made)), nearest] - done))
    share = numbers(result, SMALL, "policy")[0] / size
    told = result["robots"]["small"]["errors"]["policy"]
    assert told["of_range"] == pytest.approx(share.mean(), rel=1e-5)
    assert [told["dimensions"][one.name]["mae_of_range"] for one in SMALL.action] == pytest.approx(share, rel=1e-5)


def test_a_policy_that_is_off_by_so_much(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another amount in each step and dimension, and by nonsense past the ends of episodes."""
    _, done = all_windows(world, ARM, 2)
    off = 0.01 * (1 + np.arange(4 * 7).reshape(4, 7))
    signs = np.array([1.0, -3.0])  # of two samples

    def sample(self: Actor, observations: Sequence[Any], robots: Sequence[str], *, first: int, samples: int, **_: Any) -> list[np.ndarray]:
        assert samples == 2
        rows = done[first : first + len(observations)]
        return list(np.where(np.isnan(rows)[:, None], 1e6, rows[:, None] + signs[:, None, None] * off))

    monkeypatch.setattr(Actor, "sample_actions", sample)
    result = world.ask(ARM, samples=2)
    counts = np.isfinite(done[..., 0]).sum(axis=0)[:, None]
    assert counts[0] > counts[-1]

    def wanted(by_step: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, ...]:
        total = counts.sum()
        return (by_step * counts).sum(axis=0) / total, np.sqrt((squares * counts).sum(axis=0) / total), by_step, np.sqrt(squares)

    assert_numbers(numbers(result, ARM, "policy"), wanted(2 * off, 5 * off**2), 1e-9)
    assert_numbers(numbers(result, ARM, "mean of 2"), wanted(off, off**2), 1e-9)
    assert_numbers(numbers(result, ARM, "best of 2"), wanted(off, off**2), 1e-9)


def test_dimensions_of_which_nothing_is_known() -> None:
    """A gripper that the state does not tell of, and one that never moves."""
    blind = replace(SMALL, state=SMALL.state[:1])
    states = np.linspace(-1, 1, 6)[:, None]
    actions = np.stack([np.repeat(states, 3, axis=1) + 0.5, np.ones((6, 3))], axis=-1)
    truth = Truth(actions, np.ones((6, 3), bool), states)
    ways = forecasts(actions[:, None], actions, truth, blind, from_arrays(blind, states, actions))
    assert np.isnan(ways["hold"][..., 1]).all()
    held = errors(ways["hold"], truth, np.array([2.0, np.nan])).as_json(["joint6", "gripper"])
    assert held["dimensions"]["joint6"]["mae"] == pytest.approx(0.5) and held["of_range"] == pytest.approx(0.25)
    assert held["dimensions"]["gripper"] == {"mae": None, "rmse": None, "mae_of_range": None, "rmse_of_range": None}
    assert errors(ways["hold"], truth, np.ones(2)).as_json(["joint6", "gripper"])["of_range"] is None  # not that of the other alone
    none = errors(ways["hold"], replace(truth, mask=np.arange(3) < np.full((6, 1), 2)), np.ones(2))
    assert plain(none.step_mae[2]) == [None, None]


# --- how it is computed --------------------------------------------------------------------------------------------------------


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in result.items() if name not in ("seconds", "hardware", "text", "out")}


def test_a_mesh_says_the_same_and_programs_are_compiled_once(world: World) -> None:
    programs: list[Any] = [look, denoise]
    for program in programs:
        program.clear_cache()
    alone = world.ask(SMALL, samples=2)
    assert alone["robots"]["small"]["moments"] == 2 * ROWS + 1
    assert comparable(world.ask(SMALL, samples=2)) == comparable(alone)
    assert [program._cache_size() for program in programs] == [1, 1]
    assert comparable(world.ask(SMALL, samples=2, seed=1)) != comparable(alone)
    divided = world.ask(SMALL, samples=2, hardware=HardwareConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=1)))
    assert [program._cache_size() for program in programs] == [2, 2]
    assert divided["hardware"]["devices"] == 4
    for way in ("policy", "mean of 2", "best of 2", "hold", "mean", "replay"):
        assert_numbers(numbers(divided, SMALL, way), numbers(alone, SMALL, way), 1e-4)


# --- the command -----------------------------------------------------------------------------------------------------------------


def test_the_command(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "found"
    flags = ["--episodes", "2,0", "--every", "2", "--samples", "2", "--seed", "7", "--steps", "1", "--mesh", "data=1,fsdp=1,tensor=1"]
    flags += ["--robots-file", str(world.folder / "robots.yaml"), "--out", str(out)]
    assert main(world.flags(*flags, "--json")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "openloop.json", "openloop.md"]
    assert json.loads((out / "openloop.json").read_text()) == {key: value for key, value in result.items() if key != "out"}
    told = result["robots"]["small"]
    assert (told["sets"][0]["episodes"], told["moments"], result["every"], result["denoising_steps"]) == ([0, 2], 3 + 5, 2, 1)
    assert set(told["errors"]) == {"policy", "mean of 2", "best of 2", "hold", "mean", "replay"}
    assert {"jax", "blm-jax"} <= set(result["versions"]) and set(result["seconds"]) == {"load", "act"}
    page = (out / "index.html").read_text()
    # A chunk of each sample at each moment, and what was done, in each dimension; six ways of acting over the horizon, of all and of each.
    assert page.count('class="made"') == 2 * 2 * told["moments"] and page.count('class="done"') == 2 * 2
    assert page.count('style="stroke: ') == 6 * (1 + 2)
    assert "blm eval openloop" in page and "<script" not in page
    markdown = (out / "openloop.md").read_text()
    assert "| dimension | unit | range | policy |" in markdown and "| joint6 | rad |" in markdown

    assert main(world.flags(*flags)) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert main(world.flags("--count", "1", "--mesh", "data=1,fsdp=1,tensor=1")) == 0
    text = capsys.readouterr().out
    assert "drives small: 5 moments of 1 episode, every 1 step\nchunks of 3 steps, 1 sample each, 2 denoising steps" in text
    (joint,) = [line for line in text.splitlines() if line.startswith("joint6")]
    assert joint.split()[-4:-1] == ["0", "0", "%"] and len(joint) <= 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--robot": "smal"}, "has no row for the robot 'smal'; did you mean small?"),
        ({"--robot": "my_arm"}, "small, read as robot my_arm: columns.state"),
        ({"--episodes": "0,3"}, "small has the episodes 0 to 2, and no 3"),
        ({"SET": "nowhere"}, "nowhere is no directory of demonstrations"),
        ({"--seed": "-1"}, "seed is -1"),
        ({"--every": "0"}, "0 is not at least 1"),
        ({"--robots-file": "other.yaml"}, "robot small is not the one that is stored with the policy"),
        ({"SET": "broken"}, "broken: no episode can be used; episode 0: step 0: state 0 (joint6) of small is 9.0"),
        ({"SET": "broken", "--episodes": "1"}, "broken: episode 1 is bad: step 0: state 0 (joint6)"),
    ],
)
def test_refusals(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str) -> None:
    (tmp_path / "other.yaml").write_text(robots.render({"small": replace(SMALL, hz=11.0)}))
    given = dict(changes)
    where = tmp_path / given.pop("SET") if "SET" in given else world.folder / "small"
    if where.name == "broken":
        wide = replace(SMALL, state=(replace(SMALL.state[0], low=9, high=9.1), SMALL.state[1]))
        write(where, wide, [2, 3])
    if "--robots-file" in given:
        given["--robots-file"] = str(tmp_path / given["--robots-file"])
    flags = [part for pair in {"--robot": "small", **given}.items() for part in pair]
    assert main(["eval", "openloop", str(world.folder / "model"), str(where), *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_episodes_are_left_out_and_told(world: World, tmp_path: Path) -> None:
    with Recorder(tmp_path / "both", SMALL, "rlds") as recorder:
        for far, length in ((9, 3), (0, 9)):
            one = record(SMALL, length)
            one.state[1, 0] += far
            recorder.add(one)
    result = openloop(Request(str(world.folder / "model"), (str(tmp_path / "both"),), "small"))
    (told,) = result["robots"]["small"]["sets"]
    assert told["episodes"] == [1] and told["bad"][0]["episode"] == 0
    assert f"bad, and left out: {tmp_path / 'both'}, episode 0: step 1: state 0" in result["text"]


def test_each_set_is_named_once() -> None:
    with pytest.raises(RequestError, match="each once"):
        Request("model", ("a", "a"), "small")
