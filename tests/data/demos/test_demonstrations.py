"""Windows, surveys and mixtures of demonstrations against their definition; a robot and a folder of the user's own."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from blm_jax.cli import main
from blm_jax.config import EmbodimentConfig, PolicyConfig
from blm_jax.data.demos import episodes
from blm_jax.data.demos.demonstrations import Demonstrations, Window, open_demonstrations, training_rows
from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.observation import check
from blm_jax.data.demos.order import WindowOrder, windows
from blm_jax.data.demos.recorder import Form, Recorder
from blm_jax.data.demos.robots import Camera, Column, Columns, Dimension, Robot, find_robot, load_robots, render
from blm_jax.data.demos.sets import check_layout, open_set
from blm_jax.data.demos.statistics import from_arrays
from blm_jax.data.demos.survey import Survey, fingerprint, read_survey, survey, write_survey
from blm_jax.data.mixture import Mixture, read_shares
from blm_jax.errors import RequestError, RunError
from tests.data.demos.recordings import ARM, DIMENSIONS, FIXTURES, SMALL, copied, record, write
from tests.data.test_no_jax import run

LENGTHS = [6, 2, 9]
FORMS: tuple[Form, ...] = ("rlds", "lerobot")


def opened(path: Path, robot: Robot, future: tuple[str, ...] = ()) -> Demonstrations:
    return open_demonstrations(path, robot, survey([path], robot), future)


def all_chunks(recordings: list[Recording], robot: Robot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, chunks and masks of all windows, step by step."""
    states, chunks, masks = [], [], []
    for recording in recordings:
        for step in range(len(recording.action)):
            chunk, mask = np.zeros((robot.horizon, len(robot.action))), np.zeros(robot.horizon, bool)
            for k in range(robot.horizon):
                if step + k < len(recording.action):
                    chunk[k], mask[k] = recording.action[step + k], True
            states.append(recording.state[step])
            chunks.append(chunk)
            masks.append(mask)
    return np.array(states, np.float64), np.array(chunks), np.array(masks)


@pytest.mark.parametrize("form", FORMS)
def test_windows_are_what_they_are_defined_to_be(form: Form, tmp_path: Path) -> None:
    recordings = write(tmp_path / "set", SMALL, LENGTHS, form)
    demonstrations = opened(tmp_path / "set", SMALL, future=("base",))
    states, chunks, masks = all_chunks(recordings, SMALL)
    assert len(demonstrations) == sum(LENGTHS) == len(states) and demonstrations.episodes == 3
    places = [(episode, step) for episode, length in enumerate(LENGTHS) for step in range(length)]
    order = np.random.default_rng(0).permutation(len(states))
    for i in order:
        window, (episode, step) = demonstrations.window(int(i)), places[i]
        assert (window.robot, window.episode, window.step) == ("small", episode, step)
        np.testing.assert_array_equal(window.observation.state, states[i])
        np.testing.assert_array_equal(window.actions, chunks[i])
        np.testing.assert_array_equal(window.mask, masks[i])
        assert window.observation.instruction == f"do {episode}"
        observations = LENGTHS[episode] + (form == "rlds")  # LeRobot has no place for the one after the last action
        pictures = recordings[episode].images["base"].astype(int)
        images: Any = window.observation.images
        assert np.abs(images["base"] - pictures[step]).max() <= (0 if form == "rlds" else 6)
        assert window.has_future == (step + 3 < observations)
        wanted = pictures[step + 3] if window.has_future else np.zeros_like(pictures[0])
        assert np.abs(window.future["base"] - wanted).max() <= (0 if form == "rlds" else 6)
        check(window.observation, SMALL)  # it keeps the contract of acting
    for i in (-1, len(states)):
        with pytest.raises(IndexError):
            demonstrations.window(i)


def test_windows_may_begin_at_one_step_in_so_many(tmp_path: Path) -> None:
    write(tmp_path / "set", SMALL, LENGTHS, "rlds")
    found = survey([tmp_path / "set"], SMALL)
    every, seldom = (open_demonstrations(tmp_path / "set", SMALL, found, ("base",), one) for one in (1, 3))
    places = [every.locate(i) for i in range(len(every))]
    wanted = [i for i, (_, step) in enumerate(places) if step % 3 == 0]
    assert len(seldom) == len(wanted) == 6 and seldom.actions == LENGTHS and seldom.episodes == 3
    for i, number in enumerate(wanted):
        same(seldom.window(i), every.window(number))
    with pytest.raises(RequestError, match="every is 2: a window looks ahead 3 steps, the horizon of small"):
        open_demonstrations(tmp_path / "set", SMALL, found, (), 2)


def test_windows_are_the_same_in_another_process(tmp_path: Path) -> None:
    for form in FORMS:
        write(tmp_path / form, SMALL, LENGTHS, form)
        demonstrations = opened(tmp_path / form, SMALL)
        program = "import pickle, sys; demos = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(pickle.dumps(demos.window(11)))"
        done = subprocess.run(
            [sys.executable, "-c", program], input=pickle.dumps(demonstrations), capture_output=True, timeout=60, check=True
        )
        same(pickle.loads(done.stdout), demonstrations.window(11))


def same(one: Window, other: Window) -> None:
    np.testing.assert_equal({**vars(one), "observation": vars(one.observation)}, {**vars(other), "observation": vars(other.observation)})


def test_no_future_is_read_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set", ARM, [6], "lerobot")
    demonstrations = opened(tmp_path / "set", ARM)
    asked = []
    frames = type(demonstrations.source).frames
    monkeypatch.setattr(type(demonstrations.source), "frames", lambda self, *args: asked.append(args) or frames(self, *args))
    assert demonstrations.window(1).future == {}
    assert asked == [(0, "observation.images.front", [1]), (0, "observation.images.wrist", [1])]
    with pytest.raises(RequestError, match="no camera wrst; did you mean wrist"):
        opened(tmp_path / "set", ARM, ("wrst",))


# --- statistics ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relative", [True, False])
def test_statistics_are_of_what_is_trained(form: Form, relative: bool, tmp_path: Path) -> None:
    robot = replace(ARM, relative=relative)
    recordings = write(tmp_path / "set", robot, [30, 2, 40], form)
    found = survey([tmp_path / "set"], robot).statistics
    wanted = from_arrays(robot, *all_chunks(recordings, robot))
    for part in ("state", "action"):
        one, other = getattr(found, part), getattr(wanted, part)
        assert (one.names, one.count, one.min, one.max) == (other.names, other.count, other.min, other.max)
        for name in ("mean", "std"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)
        for name in ("q01", "q99"):
            off = np.abs(np.subtract(getattr(one, name), getattr(other, name)))
            assert (off <= 1e-3 * np.subtract(other.max, other.min)).all()


def test_several_sets_and_workers_make_the_same_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", SMALL, LENGTHS, "rlds", last=True)
    write(tmp_path / "two", SMALL, [4, 5], "lerobot")
    paths = [tmp_path / "one", tmp_path / "two"]
    found = survey(paths, SMALL)
    assert found.windows == sum(LENGTHS) + 9 and [one.actions for one in found.sets] == [(6, 2, 9), (4, 5)]
    assert survey(paths, SMALL, workers=2) == found
    assert found.outliers == ()


def test_bad_episodes_have_no_windows(tmp_path: Path) -> None:
    path = copied("lerobot_v21", tmp_path)
    (path / "data/chunk-000/episode_000000.parquet").unlink()
    demonstrations = opened(path, ARM)
    assert len(demonstrations) == 10 and demonstrations.window(0).episode == 1
    np.testing.assert_array_equal(demonstrations.window(0).actions[0], np.load(FIXTURES / "lerobot_v21.npz")["action"][12])


def test_outliers_are_named_with_their_place(tmp_path: Path) -> None:
    with Recorder(tmp_path / "set", SMALL) as recorder:
        for seed in range(4):
            one = record(SMALL, 200, seed)
            one.state[:, 0] *= 0.01
            if seed == 2:
                one.state[50, 0] = 45
            recorder.add(one)
    outliers = survey([tmp_path / "set"], SMALL).outliers
    assert any("state joint6 is 45 in episode 2 of" in line and "while 98 % lie between" in line for line in outliers)
    assert any("state joint6 is 45 in episode 2 of" in line and "outside the robot's limits of -3 to 3 rad" in line for line in outliers)
    assert not any("gripper" in line for line in outliers)


def test_a_survey_is_read_back_and_checked(tmp_path: Path) -> None:
    write(tmp_path / "set", SMALL, LENGTHS)
    found = survey([tmp_path / "set"], SMALL, "mean_std")
    write_survey(tmp_path / "small.json", found)
    assert read_survey(tmp_path / "small.json", SMALL) == found
    with pytest.raises(RequestError, match="exists"):
        write_survey(tmp_path / "small.json", found)
    for robot, says in (
        (replace(SMALL, horizon=2), "their horizon is 3, its horizon is 2"),
        (replace(SMALL, columns=Columns(state=(Column("observation.state", scale=2),))), "the entry of robot small was changed"),
    ):
        with pytest.raises(RequestError, match=says):
            read_survey(tmp_path / "small.json", robot)
    content = json.loads((tmp_path / "small.json").read_text())
    for change in (
        {"format": 2},
        {"sets": 3},
        {"sets": [{"path": "x"}]},
        {"sets": [{**content["sets"][0], "actions": [-1]}]},
        {"statistics": []},
    ):
        (tmp_path / "edited.json").write_text(json.dumps(content | change))
        with pytest.raises(RequestError) as caught:
            read_survey(tmp_path / "edited.json", SMALL)
        assert "\n" not in str(caught.value)


def test_equal_numbers_have_one_fingerprint() -> None:
    """A limit of 3 in Python is 3.0 once it was read from a file."""

    def limited(*limits: Any) -> Robot:
        return replace(SMALL, state=(Dimension("joint6", "rad", *limits), SMALL.state[1]))

    assert fingerprint(limited(-3, 0)) == fingerprint(limited(-3.0, 0.0)) == fingerprint(limited(-3.0, -0.0))
    others = [limited(-3, 0), limited(-3, 1e-9), limited(-3.5, 0), replace(limited(-3, 0), horizon=4), replace(limited(-3, 0), hz=11)]
    assert len({fingerprint(robot) for robot in others}) == len(others)


def test_a_set_that_changed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", SMALL, LENGTHS)
    write(tmp_path / "other", SMALL, [6, 3, 9])
    found = survey([tmp_path / "set"], SMALL)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert len(open_demonstrations(tmp_path / "moved", SMALL, found)) == 17  # wherever it lies
    with pytest.raises(RequestError, match="was changed after the statistics of small were made"):
        open_demonstrations(tmp_path / "other", SMALL, found)


@pytest.mark.parametrize(("form", "pattern"), [("rlds", "*-train*"), ("lerobot", "data/*/*"), ("lerobot", "videos/*/*/*")])
def test_a_file_that_changed_in_place_is_noticed(form: Form, pattern: str, tmp_path: Path) -> None:
    write(tmp_path / "set", SMALL, LENGTHS, form)
    found = survey([tmp_path / "set"], SMALL)
    (file,) = (tmp_path / "set").glob(pattern)
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(RequestError, match="was changed"):
        open_demonstrations(tmp_path / "set", SMALL, found)
    file.write_bytes(whole)  # at another time, but the same
    assert open_set(tmp_path / "set").identity == found.sets[0].identity


def test_marks_are_of_all_sizes_and_of_the_ends_of_some_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "LOOKED_INTO", 3)
    monkeypatch.setattr(episodes, "EDGE", 4)
    files = {f"{i}": epath.Path(tmp_path / f"{i}") for i in range(8)}

    def marked(number: int, contents: bytes) -> list[str]:
        """Names of the files whose marks differ once one holds something else."""
        for path in files.values():
            path.write_bytes(b"0123456789")
        before = episodes.marks(files)
        files[str(number)].write_bytes(contents)
        return [one[0] for one, other in zip(before, episodes.marks(files), strict=True) if one != other]

    assert [marked(number, b"012345678") for number in range(8)] == [[str(number)] for number in range(8)]
    assert [marked(number, b"x123456789") for number in range(8)] == [["0"], [], [], ["3"], [], [], ["6"], []]
    assert marked(3, b"012345678x") == ["3"] and marked(3, b"01234x6789") == []
    files["9"] = epath.Path(tmp_path / "none")
    assert dict(episodes.marks(files))["9"] is None


@pytest.mark.parametrize("form", FORMS)
def test_files_are_marked_once_and_not_to_open_a_set(form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set", SMALL, LENGTHS, form)
    source = open_set(tmp_path / "set")
    identity = source.identity
    monkeypatch.setattr(f"blm_jax.data.demos.{form}.marks", lambda _: 1 / 0)
    assert pickle.loads(pickle.dumps(source)).identity == identity
    with pytest.raises(ZeroDivisionError):
        _ = open_set(tmp_path / "set").identity


def test_sets_that_differ_in_numbers_alone_are_told_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        with Recorder(tmp_path / str(seed), SMALL, "lerobot") as recorder:
            recorder.add(replace(record(SMALL, 5, seed), instruction="lift"))
    with pytest.raises(RequestError, match="was changed"):
        open_demonstrations(tmp_path / "1", SMALL, survey([tmp_path / "0"], SMALL))


# --- layout ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hz": 30.0}, "the set has 20 steps a second, the robot 30: say hz: 20 in its entry"),
        ({"cameras": (Camera("front", 64, 48),)}, "are 64x64 (height x width), camera front is 64x48"),
        ({"cameras": (Camera("top", 64, 64),)}, "the set has no pictures observation.images.top"),
        ({"state": DIMENSIONS[:6], "relative": False}, "columns.state: 7 values for 6 dimensions"),
        ({"columns": Columns(state=(Column("observation.stat"),))}, "no column observation.stat; did you mean observation.state"),
        ({"columns": Columns(action=(Column("action", (0, 1, 2, 3, 4, 5, 7)),))}, "there is no element 7 to take"),
        ({"columns": Columns(instruction="text")}, "columns.instruction: the set has no text text; it has task"),
    ],
)
def test_layouts_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    source = open_set(FIXTURES / "lerobot_v30")
    check_layout(source, ARM)
    with pytest.raises(RequestError) as caught:
        check_layout(source, replace(ARM, **change))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_sets(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is no directory"):
        open_set(tmp_path / "none")
    with pytest.raises(RequestError, match="holds neither"):
        open_set(tmp_path)
    with pytest.raises(RequestError, match="each once"):
        survey([tmp_path, tmp_path], ARM)


# --- batches ---------------------------------------------------------------------------------------------------------------------


def test_training_rows_are_the_policys(tmp_path: Path) -> None:
    write(tmp_path / "arm", ARM, [8])
    write(tmp_path / "small", SMALL, [5])
    found = {robot.name: survey([tmp_path / name], robot) for name, robot in (("arm", ARM), ("small", SMALL))}
    windows = [opened(tmp_path / "small", SMALL).window(4), opened(tmp_path / "arm", ARM).window(0)]
    config = PolicyConfig(robots=("panda", "my_arm", "small"), horizon=6, embodiment=EmbodimentConfig(state_width=9, action_width=8))
    statistics = {name: one.statistics for name, one in found.items()}
    rows, chunks = training_rows(windows, {"my_arm": ARM, "small": SMALL}, statistics, config)
    assert rows.robot.tolist() == [2, 1] and rows.robot.dtype == np.int32
    assert rows.state_mask.sum(axis=1).tolist() == [2, 7]
    for i, (dims, horizon, valid) in enumerate([(2, 3, 1), (7, 4, 4)]):
        assert rows.action_mask[i].sum() == rows.action_mask[i, :horizon, :dims].sum() == dims * horizon
        assert chunks.mask[i].sum() == chunks.mask[i, :valid, :dims].sum() == dims * valid
        assert not chunks.actions[i][~chunks.mask[i]].any()
    summary = statistics["small"].action
    grip = (windows[0].actions[0, 1] - (summary.q01[1] + summary.q99[1]) / 2) / ((summary.q99[1] - summary.q01[1]) / 2)  # absolute
    turn = windows[0].actions[0, 0] - windows[0].observation.state[0]
    turn = (turn - (summary.q01[0] + summary.q99[0]) / 2) / ((summary.q99[0] - summary.q01[0]) / 2)
    np.testing.assert_allclose(chunks.actions[0, 0, :2], [turn, grip], rtol=1e-5)
    with pytest.raises(RequestError, match="the policy has no robot small"):
        training_rows(windows, {"my_arm": ARM, "small": SMALL}, statistics, replace(config, robots=("my_arm",)))


def test_mixtures_draw_by_weight_and_are_numbered(tmp_path: Path) -> None:
    write(tmp_path / "arm", ARM, [8, 12])
    write(tmp_path / "small", SMALL, [5])
    sets = {"arm": opened(tmp_path / "arm", ARM), "small": opened(tmp_path / "small", SMALL)}
    shares = read_shares({"arm": 1, "small": 3}, {name: len(one) for name, one in sets.items()})
    mixture = Mixture([one.in_mixture(name, shares[name]) for name, one in sets.items()])
    order = WindowOrder(mixture, seed=7)
    drawn = [order[i] for i in range(1000)]
    counts = Counter(corpus for corpus, _ in drawn)
    assert abs(counts[1] - 750) <= 15
    assert set(drawn) == {(0, i) for i in range(20)} | {(1, i) for i in range(5)}  # all are seen
    again = pickle.loads(pickle.dumps(WindowOrder(mixture, seed=7)))
    assert [again[i] for i in (999, 0, 500)] == [drawn[i] for i in (999, 0, 500)]
    assert [WindowOrder(mixture, seed=8)[i] for i in range(50)] != drawn[:50]
    with pytest.raises(RequestError, match="counted from 0"):
        _ = order[-1]
    many = WindowOrder(Mixture([windows("many", 10**6), windows("more", 10**6, Fraction(1, 10**6))]), seed=7)
    assert len(pickle.dumps(many)) < 500
    assert pickle.loads(pickle.dumps(many))[5] == many[5]


@pytest.mark.parametrize("share", [Fraction(1), Fraction(2), Fraction(1, 3), Fraction(7, 3)])
def test_epochs_of_any_share_follow_each_other(share: Fraction) -> None:
    demonstrations = Demonstrations(open_set(FIXTURES / "lerobot_v30"), ARM, np.array([12, 10]))
    mixture = Mixture([demonstrations.in_mixture("arm", share)])
    order = WindowOrder(mixture, seed=0)
    wanted = np.concatenate([mixture.draws(0, epoch) for epoch in range(9)]).tolist()
    assert [order[i][1] for i in range(len(wanted))] == wanted


def test_a_set_that_breaks_while_training_is_named(tmp_path: Path) -> None:
    path = copied("lerobot_v30", tmp_path)
    demonstrations = opened(path, ARM)
    next(path.glob("videos/*wrist/*/*")).unlink()
    with pytest.raises(RunError, match=r"lerobot_v30, episode 1: videos/observation.images.wrist/chunk-000/file-000.mp4 is missing"):
        demonstrations.window(15)
    with pytest.raises(RunError, match=r"file-000.mp4 is missing"):
        demonstrations.window(3)


# --- my robot, my folder ---------------------------------------------------------------------------------------------------------

MINE = Robot(
    "cellar_arm",
    tuple(Dimension(f"axis{i}", "rad", -3.2, 3.2) for i in range(6)),
    tuple(Dimension(f"axis{i}", "rad", -3.2, 3.2) for i in range(6)),
    (Camera("door", 32, 48),),
    hz=15,
    horizon=5,
    executed=5,
)


def test_a_robot_and_a_folder_of_my_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No code is edited: a set whose angles are in degrees, a file that describes the robot; inspect, stats, windows."""
    degrees = replace(MINE, state=tuple(replace(one, low=-180, high=180) for one in MINE.state), columns=Columns())
    degrees = replace(degrees, action=degrees.state)
    recordings = write(tmp_path / "cellar", degrees, [20, 25], "lerobot")
    scaled = tuple(Column(name, scale=np.pi / 180) for name in ("observation.state", "action"))
    entry = replace(MINE, columns=Columns(state=scaled[:1], action=scaled[1:]))
    (tmp_path / "robots.yaml").write_text(render({entry.name: entry}))
    options = ["--robot", "cellar_arm", "--robots-file", str(tmp_path / "robots.yaml"), "--out", str(tmp_path / "cellar.json")]
    assert main(["data", "inspect", str(tmp_path / "cellar"), *options[:4], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bad"] == [] and [episode["steps"] for episode in said["shown"]] == [20, 25]
    found = said["shown"][1]["action"]["axis3"]
    values = np.deg2rad(recordings[1].action[:, 3].astype(np.float64))
    np.testing.assert_allclose([found["min"], found["max"]], [values.min(), values.max()])
    assert (found["unit"], found["limits"], found["beyond"]) == ("rad", [-3.2, 3.2], False)

    assert main(["data", "stats", str(tmp_path / "cellar"), *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (said["episodes"], said["windows"], said["bad"], said["outliers"]) == (2, 45, [], [])

    robot = find_robot("cellar_arm", load_robots([tmp_path / "robots.yaml"]))
    demonstrations = open_demonstrations(tmp_path / "cellar", robot, read_survey(tmp_path / "cellar.json", robot))
    episode = demonstrations.episode(1)
    np.testing.assert_allclose(episode.action, np.deg2rad(recordings[1].action.astype(np.float64)))
    np.testing.assert_allclose(demonstrations.window(20).observation.state, np.deg2rad(recordings[1].state[0]), rtol=1e-6)

    assert main(["data", "stats", str(tmp_path / "cellar"), *options]) == 2
    assert "cellar.json exists" in capsys.readouterr().err
    options[1] = "celar_arm"
    options[-1] = str(tmp_path / "new.json")
    assert main(["data", "stats", str(tmp_path / "cellar"), *options]) == 2
    assert "did you mean cellar_arm" in capsys.readouterr().err and not (tmp_path / "new.json").exists()


def test_the_command_says_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied("lerobot_v21", tmp_path)
    (path / "videos/chunk-000/observation.images.wrist/episode_000001.mp4").unlink()
    (tmp_path / "robots.yaml").write_text(render({ARM.name: ARM}))
    options = ["--robot", "my_arm", "--robots-file", str(tmp_path / "robots.yaml"), "--out", str(tmp_path / "arm.json")]
    assert main(["data", "stats", str(path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("arm.json: 12 windows of 2 episodes, 1 of them bad")
    assert lines[1] == f"bad: {path}, episode 1: videos/chunk-000/observation.images.wrist/episode_000001.mp4 is missing"


PROGRAM = """
from blm_jax.data.command import show_demonstrations
from blm_jax.data.demos.demonstrations import open_demonstrations
from blm_jax.data.demos.robots import render
from blm_jax.data.demos.survey import survey
from tests.data.demos.recordings import ARM, write
from pathlib import Path

robots = Path(sys.argv[1]) / "robots.yaml"
robots.write_text(render({ARM.name: ARM}))
for form in ("rlds", "lerobot"):
    path = Path(sys.argv[1]) / form
    write(path, ARM, [6], form)
    show_demonstrations(str(path), ARM.name, robots_files=[str(robots)], out=sys.argv[1] + "/page")
    print(open_demonstrations(path, ARM, survey([path], ARM), ("front",)).window(5).mask.sum())
"""


def test_all_of_it_works_without_jax_torch_and_tensorflow(tmp_path: Path) -> None:
    assert run(PROGRAM, [str(tmp_path)]) == [1, 1]


def test_a_survey_is_of_one_kind_with_its_fingerprint() -> None:
    found: Survey = survey([FIXTURES / "lerobot_v30"], ARM)
    assert found.statistics.fingerprint.startswith("sha256:") and found == survey([FIXTURES / "lerobot_v30"], ARM)
