"""How episodes begin, and the rules of success at their borders."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.scene import BALL, BOX, NOTHING, Setting, State
from blm_jax.evaluate.world.tasks import LIFT, PICK, PLACE, PULL, PUSH, STACK, TASKS, WIDOWX

MANY = 20_000
EDGE = 1e-5  # beside a border


@pytest.fixture(scope="module")
def begun() -> dict[bool, tuple[Setting, State, np.ndarray]]:
    """Resets of all robots and tasks, without another cube and with one."""
    number = np.arange(MANY)
    robots, chosen = number % 4, number // 4 % 6
    reset = jax.jit(jax.vmap(tasks.reset, in_axes=(0, 0, 0, None)))
    keys = jax.random.split(jax.random.key(7), MANY)
    return {other: (*jax.tree.map(np.asarray, reset(keys, robots, chosen, other)), robots) for other in (False, True)}


def within(x: np.ndarray, low: object, high: object) -> None:
    """All lie in the box, and come near its borders."""
    low, high = np.asarray(low), np.asarray(high)
    assert np.all(x >= low - 1e-6) and np.all(x <= high + 1e-6)
    room = 0.02 * (high - low) + 1e-6
    assert np.all(x.min(0) <= low + room) and np.all(x.max(0) >= high - room)


def test_bodies_begin_in_maniskills_boxes(begun: dict) -> None:
    setting, state, robots = begun[False]
    at = state.position
    for task in (PUSH, PULL, LIFT):
        within(at[setting.task == task, 0, :2], [-0.1, -0.1], [0.1, 0.1])
    small = robots == WIDOWX
    within(at[(setting.task == PICK) & ~small, 0, :2], [-0.1, -0.1], [0.1, 0.1])
    moved = np.array([0.315, 0, 0])  # from ManiSkill's base and box of this cell
    within(at[(setting.task == PICK) & small, 0, :2] - moved[:2], [-0.3, -0.05], [-0.2, 0.05])
    within(setting.goal[(setting.task == PICK) & ~small], [-0.1, -0.1, 0.02], [0.1, 0.1, 0.32])
    within(setting.goal[(setting.task == PICK) & small] - moved, [-0.3, -0.05, 0.018], [-0.2, 0.05, 0.218])
    place = setting.task == PLACE
    within(at[place, 0, :2], [-0.1, -0.1], [-0.05, 0.1])
    within(setting.bin[place, :2], [0, -0.1], [0.1, 0.1])
    stack = at[setting.task == STACK]
    assert np.abs(stack[..., 0]).max() <= 0.2 and np.abs(stack[..., 1]).max() <= 0.3
    assert np.abs(stack[..., 0]).max() > 0.17 and np.abs(stack[..., 1]).max() > 0.26
    assert np.linalg.norm(stack[:, 0, :2] - stack[:, 1, :2], axis=-1).min() > tasks.APART_STACKED


def test_bodies_are_maniskills(begun: dict) -> None:
    setting, state, robots = begun[False]
    small = (robots == WIDOWX) & (setting.task == PICK)
    np.testing.assert_array_equal(setting.kind[:, 0], np.where(setting.task == PLACE, BALL, BOX))
    np.testing.assert_array_equal(setting.kind[:, 1], np.where(setting.task == STACK, BOX, NOTHING))
    np.testing.assert_allclose(setting.half[:, 0, 0], np.select([setting.task == LIFT, small], [0.12, 0.018], 0.02))
    np.testing.assert_allclose(setting.half[:, 0, 2], np.select([setting.task == LIFT, small], [0.025, 0.018], 0.02))
    np.testing.assert_allclose(state.position[:, 0, 2], setting.half[:, 0, 2])
    ahead = np.select([setting.task == PUSH, setting.task == PULL], [0.2, -0.2])
    slides = (setting.task == PUSH) | (setting.task == PULL)
    np.testing.assert_allclose((setting.goal - state.position[:, 0])[slides, 0], ahead[slides], atol=1e-6)
    np.testing.assert_array_equal(setting.goal_seen, setting.task <= PULL)
    np.testing.assert_array_equal(setting.has_bin, setting.task == PLACE)
    bases = {"panda": -0.615, "xarm6": -0.522, "xarm7": -0.522}
    for robot, x in bases.items():
        np.testing.assert_allclose(setting.base[robots == ROBOTS.index(robot), 0], x)
    np.testing.assert_allclose(setting.base[robots == WIDOWX, 0], -0.3)
    noise = state.joints - setting.arm.ready
    assert noise[robots == WIDOWX].max() == 0
    assert noise[robots == 0].std() == pytest.approx(0.02, rel=0.05)
    done = np.asarray(jax.vmap(tasks.succeeded)(setting, state))
    assert not done[setting.task != PICK].any()
    assert done[setting.task == PICK].mean() < 0.005  # ManiSkill's goal may happen to lie where the cube does


def test_another_cube_is_only_told_by_the_instruction(begun: dict) -> None:
    setting, state, robots = begun[True]
    cubes = setting.task <= PULL
    assert np.all(setting.kind[cubes] == BOX) and np.all(setting.half[cubes, 0] == setting.half[cubes, 1])
    assert 0.45 < setting.wanted[cubes].mean() < 0.55
    assert setting.wanted[~cubes].max() == 0
    apart = np.abs(state.position[:, 0] - state.position[:, 1])
    slides = (setting.task == PUSH) | (setting.task == PULL)
    assert apart[slides, 1].min() > tasks.APART_PUSHED
    picks = setting.task == PICK
    needed = np.where(robots == WIDOWX, tasks.APART_PICKED[1], tasks.APART_PICKED[0])
    assert np.all(np.linalg.norm(apart[..., :2], axis=-1)[picks] > needed[picks])
    assert not setting.goal_seen[slides].any() and setting.goal_seen[picks].all()
    for body in (0, 1):
        within(state.position[slides, body, :2], [-0.1, -0.1], [0.1, 0.1])
    asked = np.asarray(jax.vmap(tasks.asked)(setting))
    assert np.all(asked[:, 1] != asked[:, 2])
    wanted = setting.colour[np.arange(MANY), setting.wanted]
    np.testing.assert_array_equal(tasks.PALETTE[asked[:, 1]], wanted)
    assert len(np.unique(asked[:, 1])) == len(tasks.COLOURS)
    words = [tasks.instruction(*row, wording=n) for n, row in enumerate(asked[:600].tolist())]
    assert all(tasks.COLOURS[row[1]] in text for text, row in zip(words, asked[:600], strict=True))
    assert len({tasks.instruction(task, 0, 1, wording) for task in range(6) for wording in range(3)}) == 18


def test_the_same_key_begins_the_same_episode(begun: dict) -> None:
    setting, state, robots = begun[False]
    key = jax.random.split(jax.random.key(7), MANY)[17]
    again = tasks.reset(key, int(robots[17]), int(setting.task[17]))
    first = jax.tree.map(lambda x: x[17], (setting, state))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), again, first)


RULE = jax.jit(tasks.succeeded)


def episode(task: int, robot: int = 0) -> tuple[Setting, State]:
    return tasks.reset(jax.random.key(1), robot, task)


def put(state: State, at: object, body: int = 0) -> State:
    return state._replace(position=state.position.at[body].set(jnp.asarray(at, jnp.float32)))


@pytest.mark.parametrize(("robot", "within_goal"), [(0, 0.025), (WIDOWX, 0.0225)])
def test_picked(robot: int, within_goal: float) -> None:
    setting, state = episode(PICK, robot)
    away = np.array([2, -1, 2]) / 3
    for sign, good in ((-1, True), (1, False)):
        near = put(state, setting.goal + away * (within_goal + sign * EDGE))
        assert bool(RULE(setting, near)) is good
        assert bool(RULE(setting, near._replace(moving=jnp.float32(0.2)))) is good
        assert not RULE(setting, near._replace(moving=jnp.float32(0.2001)))


@pytest.mark.parametrize("task", [PUSH, PULL])
def test_pushed_and_pulled(task: int) -> None:
    setting, state = episode(task)
    for sign in (-1, 1):
        for high in (0.02, 0.025 - EDGE, 0.025 + EDGE):
            at = setting.goal + np.array([0.06, 0.08, 0]) * (1 + sign * 1e-4) + np.array([0, 0, high])
            assert bool(RULE(setting, put(state, at))) is (sign < 0 and (high < 0.025 or task == PULL))


def test_stacked() -> None:
    setting, state = episode(STACK)
    below = state.position[1]
    border = 2**0.5 * 0.02 + 0.005
    for flat, high in ((0, 0.04), (border - EDGE, 0.04), (border + EDGE, 0.04), (0, 0.045 - EDGE), (0, 0.045 + EDGE), (0, 0.035 - EDGE)):
        on = put(state, below + np.array([0.6 * flat, 0.8 * flat, high]))
        assert bool(RULE(setting, on)) is (flat < border and abs(high - 0.04) < 0.005)
    on = put(state, below + np.array([0, 0, 0.04]))
    assert not RULE(setting, on._replace(held=jnp.int32(0)))
    assert not RULE(setting, on._replace(falling=jnp.array([0.1, 0])))
    assert not RULE(setting, on._replace(speed=jnp.array([0.011, 0])))
    assert RULE(setting, on._replace(speed=jnp.array([0.009, 0.5]), moving=jnp.float32(2)))


def test_placed() -> None:
    setting, state = episode(PLACE)
    for flat, high in ((0, 0.025), (0.005 - EDGE, 0.025), (0.005 + EDGE, 0.025), (0, 0.03 - EDGE), (0, 0.03 + EDGE), (0, 0.02 - EDGE)):
        there = put(state, setting.bin + np.array([0.6 * flat, -0.8 * flat, high]))
        assert bool(RULE(setting, there)) is (flat < 0.005 and abs(high - 0.025) < 0.005)
    there = put(state, setting.bin + np.array([0, 0, 0.025]))
    assert not RULE(setting, there._replace(held=jnp.int32(0)))


@pytest.mark.parametrize("end", [1, -1])
def test_lifted(end: int) -> None:
    setting, state = episode(LIFT)
    for tilt, high in ((0, 0.12), (0.08 - 1e-4, 0.12), (0.08 + 1e-4, 0.12), (0, 0.125 - EDGE), (0, 0.125 + EDGE), (0, 0.115 - EDGE)):
        axis = np.array([0.6 * np.sin(tilt), 0.8 * np.sin(tilt), end * np.cos(tilt)])
        side = np.cross([0.8, -0.6, 0], axis)
        turn = np.stack([axis, [0.8, -0.6, 0], -side], -1)
        stands = put(state, [0, 0, high])._replace(rotation=state.rotation.at[0].set(jnp.asarray(turn, jnp.float32)))
        assert bool(RULE(setting, stands)) is (tilt < 0.08 and abs(high - 0.12) < 0.005)


def test_all_tasks_have_words_and_limits() -> None:
    assert len(TASKS) == len(tasks.WORDINGS) == len(tasks.LIMITS) == len(tasks.BOXES_LOW)
    assert len(ROBOTS) == len(tasks.BASE_X)
