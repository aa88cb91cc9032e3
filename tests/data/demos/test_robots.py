"""The registry of robots: what it holds, what a user may add, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blm_jax.data.demos.robots import (
    Camera,
    Column,
    Columns,
    Dimension,
    Robot,
    action_mask,
    check_stored,
    clip,
    find_robot,
    from_json,
    limits,
    load_robots,
    pad,
    render,
    state_mask,
    take_columns,
    to_json,
)
from blm_jax.errors import RequestError

OURS = load_robots()
MINE = """
robots:
- name: my_arm
  state: &arm
  - {name: shoulder, unit: rad, low: -2, high: 2}
  - {name: lift, unit: m, low: 0, high: 0.5}
  - {name: gripper, unit: opening, low: 0, high: 1, kind: gripper}
  action: *arm
  cameras: [{name: front, height: 240, width: 320}]
  hz: 30
  horizon: 10
  executed: 5
  columns:
    state: [{name: qpos, take: [0, 1]}, {name: grip, scale: -1.25, offset: 1}]
    action: [{name: target}]
    cameras: {front: observation.images.cam_high}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "mine.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the four arms -----------------------------------------------------------------------------------------------------------

# Poses in which simulators start these arms: written by others, so limits copied wrongly would not hold them.
START = {
    "panda": (0, math.pi / 8, 0, -math.pi * 5 / 8, 0, math.pi * 3 / 4, math.pi / 4),
    "xarm6": (0, 0.22, -1.23, 0, 1.01, 0),
    "xarm7": (0, -0.4, 0, 0.5, 0, 0.9, -3),
    "widowxai": (0, 1.38, 1.04, -1.26, 0, 0),
}


def test_the_package_knows_four_arms_and_their_like_in_the_world() -> None:
    assert list(OURS) == [*START, *(f"world_{name}" for name in START)]
    assert [len(OURS[name].state) for name in START] == [8, 7, 8, 7]
    for name in START:
        robot, like = OURS[name], OURS[f"world_{name}"]
        cameras = Camera("front", 112, 112), Camera("side", 112, 112)
        assert like == replace(robot, name=like.name, executed=4, cameras=cameras)
        assert robot.state == robot.action and robot.hz == 20 and robot.relative
        assert [dimension.kind for dimension in robot.state] == ["joint"] * (len(robot.state) - 1) + ["gripper"]
        assert {dimension.unit for dimension in robot.state[:-1]} == {"rad"}
        assert robot.cameras == (Camera("base", 128, 128), Camera("wrist", 128, 128))


@pytest.mark.parametrize("name", START)
def test_the_pose_in_which_an_arm_starts_is_within_its_limits(name: str) -> None:
    for value, dimension in zip(START[name], OURS[name].state, strict=False):
        assert dimension.low <= value <= dimension.high and dimension.high - dimension.low < 4.01 * math.pi


def test_a_joint_that_cannot_be_straight() -> None:
    elbow = OURS["panda"].state[3]
    assert (elbow.name, elbow.low, elbow.high) == ("panda_joint4", -3.0718, -0.0698)
    assert (OURS["xarm7"].state[3].low, OURS["xarm7"].state[3].high) == (-0.19198, 3.927)
    assert OURS["widowxai"].state[2].high == math.radians(135)


# --- a robot of the user's -----------------------------------------------------------------------------------------------------


def test_a_robot_of_the_users(write) -> None:
    robots = load_robots([write(MINE)])
    assert list(robots) == [*OURS, "my_arm"]
    mine = robots["my_arm"]
    assert (mine.hz, mine.horizon, mine.executed, mine.relative) == (30.0, 10, 5, True)
    assert mine.action[1] == Dimension("lift", "m", 0.0, 0.5)
    assert mine.camera_column("front") == "observation.images.cam_high"
    assert OURS["panda"].camera_column("wrist") == "observation.images.wrist"
    values = {"qpos": np.array([[0.5, 0.25, 9, 9], [1, 0.5, 9, 9]]), "grip": np.array([0.0, 0.8])}
    np.testing.assert_allclose(take_columns(mine.columns.state, values, mine.state), [[0.5, 0.25, 1], [1, 0.5, 0]], atol=1e-15)


def test_files_add_up_and_replace_nothing(write) -> None:
    mine, panda = write(MINE), write(MINE.replace("my_arm", "panda"), "panda.yaml")
    again = write(MINE, "again.yaml")
    other = write(MINE.replace("my_arm", "other"), "other.yaml")
    assert list(load_robots([mine, other])) == [*OURS, "my_arm", "other"]
    assert message(load_robots, [panda]) == f"{panda}: robot panda is already defined in the package: give it another name"
    assert message(load_robots, [mine, again]) == f"{again}: robot my_arm is already defined in {mine}: give it another name"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("high: 0.5", "high: 0.6", "state.1.high is 0.6, there 0.5"),
        ("hz: 30", "hz: 25", "hz is 25.0, there 30.0"),
        ("{name: front,", "{name: side, height: 2, width: 2}, {name: front,", "cameras is 2 entries, there 1 entries"),
        ("cameras: {front: observation.images.cam_high}", "instruction: words", "columns.cameras is empty, there front"),
    ],
)
def test_a_robot_that_is_stored_is_not_redefined(old: str, new: str, says: str, write) -> None:
    mine = write(MINE)
    stored = {"my_arm": load_robots([mine])["my_arm"]}
    check_stored(stored, [mine])
    check_stored({"panda": replace(OURS["panda"], horizon=9)}, [mine])  # one that is not stored, and a stored one of the package
    other = write(MINE.replace(old, new), "other.yaml")
    expected = f"{other}: robot my_arm is not the one that is stored with the policy: {says}; rename it"
    assert message(check_stored, stored, [other]) == expected
    assert "is already defined in" in message(check_stored, stored, [mine, other])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("low: -2,", "low: two,", ":5: robots.0.state.0.low: expected a number, found 'two' (text)"),
        ("unit: m,", "unit: mm,", ":6: robots.0.state.1.unit: 'mm' is not one of rad, m, opening"),
        ("low: -2,", "lo: -2,", ":5: robots.0.state.0.lo: no such key; did you mean low?"),
        ("low: -2, ", "", ": robots.0.state.0.low is missing"),
        ("low: -2,", "low: 3,", ": robots.0.state.0: dimension shoulder: limits of 3.0 to 2.0 hold nothing"),
        ("high: 2}", "high: .inf}", "dimension shoulder: limits of -2.0 to inf hold nothing"),
        (
            "high: 1, kind: gripper",
            "high: 0.08, kind: gripper",
            "a gripper is an opening from 0 (closed) to 1 (open), not from 0.0 to 0.08",
        ),
        (", kind: gripper", "", "kind joint with unit opening"),
        ("name: lift", "name: shoulder", ": robots.0: robot my_arm: state shoulder is given twice"),
        ("name: lift", "name: the lift", "dimension 'the lift': a name is made of"),
        ("hz: 30", "hz: 0", "robots.0: robot my_arm: hz is 0.0"),
        ("executed: 5", "executed: 11", "executed is 11: it must be at least 1 and at most the horizon of 10"),
        ("hz: 30", "control: torque", ":10: robots.0.control: 'torque' is not one of joint_position"),
        ("height: 240", "height: 0", "camera front: 0x320 pixels are no picture"),
        ("{front: obs", "{frnt: obs", "columns.cameras: there is no camera frnt; did you mean front?"),
        ("cameras: [{name: front, height: 240, width: 320}]", "cameras: []", "robot my_arm has no camera"),
        ("action: *arm", "action: [{name: tilt, unit: rad, low: 0, high: 1}]", "action tilt is relative, but no state of that name"),
        ("{name: target}", "{name: target, take: [0]}", "columns.action takes 1 values, but its action has 3 dimensions"),
        ("take: [0, 1]", "take: [-1]", "column qpos: take [-1] counts from 0"),
        ("scale: -1.25", "scale: 0", "column grip: scale 0.0 and offset 1.0 lose the values"),
        ("- name: my_arm", "- nam: my_arm", ":3: robots.0.nam: no such key; did you mean name?"),
        ("robots:", "include: [x.yaml]\nrobots:", ":2: include: no such key"),
    ],
)
def test_a_bad_entry_is_one_line_with_file_and_path(write, old: str, new: str, says: str) -> None:
    assert old in MINE
    file = write(MINE.replace(old, new, 1))
    text = message(load_robots, [file])
    assert text.startswith(str(file)) and says in text


def test_files_that_hold_no_robots(write, tmp_path: Path) -> None:
    twice = write(MINE + MINE.replace("robots:\n", "").replace("arm\n  -", "again\n  -").replace("*arm", "*again"))
    assert message(load_robots, [twice]) == f"{twice}: robot my_arm is given twice"
    assert message(load_robots, [write("")]).endswith("robots is missing")
    assert "expected a list" in message(load_robots, [write("robots: panda")])
    assert message(load_robots, [tmp_path / "none.yaml"]).endswith("none.yaml: no such file")


def test_an_unknown_robot_suggests_the_near_one() -> None:
    assert find_robot("xarm7", OURS) is OURS["xarm7"]
    assert message(find_robot, "pandaa", OURS) == "there is no robot 'pandaa'; did you mean panda?"
    assert message(find_robot, "kuka", OURS) == f"there is no robot 'kuka'; there are {', '.join(OURS)}"


# --- out and in again ------------------------------------------------------------------------------------------------------------

names = st.text("abcXYZ019_.-", min_size=1, max_size=8)
number = st.floats(-1e6, 1e6, allow_subnormal=False)


@st.composite
def dimension(draw: st.DrawFn, name: str) -> Dimension:
    if draw(st.booleans()):
        return Dimension(name, "opening", 0, 1, "gripper")
    low = draw(number)
    return Dimension(name, draw(st.sampled_from(["rad", "m"])), low, low + draw(st.floats(0.001, 10)))


@st.composite
def robot(draw: st.DrawFn, name: str = "arm") -> Robot:
    state = tuple(draw(dimension(one)) for one in draw(st.lists(names, min_size=1, max_size=5, unique=True)))
    cameras = tuple(Camera(one, 64, draw(st.integers(1, 512))) for one in draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    horizon = draw(st.integers(1, 20))
    columns = Columns(
        state=(Column(draw(st.text()), scale=draw(st.sampled_from([1e-5, -1.25, 1e20])), offset=draw(number)),),
        cameras={camera.name: draw(st.text()) for camera in cameras if draw(st.booleans())},
        instruction=draw(st.text() | st.sampled_from(["null", "1e3", "no", "\x7f", "\U0001f916"])),
    )
    given = draw(st.booleans())
    return Robot(
        name, state, state, cameras, "joint_position", given, draw(st.floats(0.1, 1e3)), horizon, draw(st.integers(1, horizon)), columns
    )


robots = st.lists(names, min_size=1, max_size=3, unique=True).flatmap(
    lambda found: st.tuples(*map(robot, found)).map(lambda made: {one.name: one for one in made})
)


@settings(max_examples=40)
@given(robots)
def test_json_brings_back_equal_robots_in_order(made: dict[str, Robot]) -> None:
    back = from_json(json.loads(json.dumps(to_json(made))), "config.json")
    assert back == made and list(back) == list(made)


@settings(max_examples=40)
@given(robot())
def test_what_is_rendered_loads_as_the_same(tmp_path_factory: pytest.TempPathFactory, made: Robot) -> None:
    file = tmp_path_factory.getbasetemp() / "rendered_robots.yaml"
    file.write_text(render({"arm": made}))
    assert load_robots([file])["arm"] == made


def test_json_that_was_edited_names_the_place() -> None:
    value: Any = json.loads(json.dumps(to_json(OURS)))
    value[1]["state"][2]["low"] = "x"
    assert message(from_json, value, "config.json") == "config.json: robots.1.state.2.low: expected a number, found 'x' (text)"
    assert message(from_json, {"panda": 1}, "config.json").startswith("config.json: robots: expected a list")


# --- layout ----------------------------------------------------------------------------------------------------------------------


@given(arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=6), elements=st.floats(-9, 9, width=32)), st.integers(0, 8))
def test_padding_adds_zeros_behind(values: np.ndarray, more: int) -> None:
    padded = pad(values, values.shape[-1] + more)
    assert padded.dtype == values.dtype and padded.shape == (*values.shape[:-1], values.shape[-1] + more)
    np.testing.assert_array_equal(padded[..., : values.shape[-1]], values)
    assert not padded[..., values.shape[-1] :].any()


@given(robot(), st.integers(0, 8), st.integers(0, 8))
def test_masks_mark_what_the_robot_has(made: Robot, wider: int, longer: int) -> None:
    dims = len(made.action)
    mask = action_mask(made, made.horizon + longer, dims + wider)
    assert mask.shape == (made.horizon + longer, dims + wider)
    assert mask[: made.horizon, :dims].all() and mask.sum() == made.horizon * dims
    np.testing.assert_array_equal(state_mask(made, dims + wider), pad(np.ones(dims, bool), dims + wider))


def test_a_robot_that_does_not_fit_the_policy() -> None:
    panda = OURS["panda"]
    assert "robot panda has 8 state dimensions, the policy room for 7: raise" in message(state_mask, panda, 7)
    assert "robot panda has 8 action dimensions, the policy room for 7: raise" in message(action_mask, panda, 16, 7)
    assert "robot panda has chunks of 16 steps, the policy of 8: lower" in message(action_mask, panda, 8, 32)
    assert message(pad, np.zeros(8), 7) == "8 values do not fit a width of 7"


@given(robot(), st.integers(0, 2**32 - 1))
def test_clipped_actions_lie_within_the_true_limits(made: Robot, seed: int) -> None:
    actions = np.random.default_rng(seed).normal(0, 1e6, (3, 4, len(made.action)))
    clipped = clip(actions, made)
    assert clipped.dtype == np.float32
    low, high = limits(made.action)
    for i, one in enumerate(made.action):
        # Between limits closer than float32 tells apart there may be no number; those here are not.
        if low[i] <= high[i]:
            assert (clipped[..., i].astype(np.float64) >= one.low).all() and (clipped[..., i].astype(np.float64) <= one.high).all()
    inside = np.clip(actions.astype(np.float32), low, high) == actions.astype(np.float32)
    np.testing.assert_array_equal(clipped[inside], actions.astype(np.float32)[inside])


def test_columns_that_do_not_fit() -> None:
    state = OURS["xarm6"].state
    values = {"observation.state": np.zeros((2, 8)), "gripper": np.zeros(2)}
    assert "observation.state: 8 values for 7 dimensions" in message(take_columns, Columns().state, values, state)
    assert "no column observation.stat; did you mean observation.state?" in message(
        take_columns, (Column("observation.stat"),), values, state
    )
    assert "has 8 elements: there is no element 9" in message(take_columns, (Column("observation.state", take=(9,)),), values, state)
    single = replace(OURS["xarm6"], state=state[-1:], action=state[-1:])
    found = take_columns((Column("gripper", scale=2, offset=0.5),), values, single.state)
    np.testing.assert_array_equal(found, [[0.5], [0.5]])
