"""The world's contact, by what must hold whatever the hand does; all scenes are flown at once, in one compiled program."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.evaluate.world import arms, contact, physics, tasks
from blm_jax.evaluate.world.ik import reach
from blm_jax.evaluate.world.scene import BALL, BOX, HZ, JOINTS, NOTHING, Setting, State

STEPS = 48
CUBE, PEG, BALL_SIZE = (0.02, 0.02, 0.02), (0.12, 0.025, 0.025), (0.02, 0.02, 0.02)
AWAY = (-0.1, 0.0, 0.4)  # a hand that does nothing
OPEN, SHUT = 1.0, 0.0


def looking_down(yaw: float = 0.0) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0], [s, -c, 0], [0, 0, -1]])


def about_x(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def about_y(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


class Body(NamedTuple):
    kind: int = NOTHING
    half: tuple[float, float, float] = (0, 0, 0)
    at: tuple[float, float, float] = (0, 0, 0)
    turn: np.ndarray = np.eye(3)


class Scene(NamedTuple):
    """What lies there, and a way of the hand through points (step, place, opening), straight in between."""

    bodies: tuple[Body, Body]
    way: list[tuple[float, tuple[float, float, float], float]]
    yaw: float = 0.0
    robot: int = 0
    roll: float = 0.0  # of the hand: one pad is lower than the other
    bin_at: tuple[float, float, float] | None = None


def one(at: tuple[float, float, float], half: tuple[float, float, float] = CUBE, turn: np.ndarray | None = None) -> tuple[Body, Body]:
    return Body(BOX, half, at, np.eye(3) if turn is None else turn), Body()


def idle(*bodies: Body, bin_at: tuple[float, float, float] | None = None) -> Scene:
    return Scene((bodies[0], bodies[1] if len(bodies) > 1 else Body()), [(0, AWAY, OPEN)], bin_at=bin_at)


def grasp(at: tuple[float, float, float], off: tuple[float, float, float] = (0, 0, 0), depth: float = 0.0) -> list:
    """Come down over a place, close, rise, open."""
    x, y, z = (a + o for a, o in zip(at, off, strict=True))
    low = (x, y, z + depth)
    high = (x, y, 0.2)
    return [(0, (x, y, 0.1), OPEN), (6, low, OPEN), (7, low, SHUT), (18, low, SHUT), (26, high, SHUT), (36, high, SHUT), (37, high, OPEN)]


PUSHES = [0.0, 0.004, 0.01, -0.01, 0.022, -0.022]
YAWS = np.linspace(-0.75, 0.75, 12)
ROLLS = [0.02, 0.05, 0.1, 0.2, -0.1, -0.2]
INTO_BIN = [0.0, 0.004, -0.01, 0.02]
MISSES = [(0.039, 0, 0), (-0.039, 0, 0), (0, 0.0853, 0), (0, -0.0853, 0), (0, 0, 0.03), (0.05, 0.05, 0)]
OVERHANGS = [0.0, 0.01, 0.018, 0.022, 0.03, 0.039]
TILTS = [0.0, 0.1, 0.19, 0.22, 0.4, 1.2]
DROPS = [(0.0, 0.0), (0.006, 0.004), (-0.012, 0.01), (0.017, -0.015), (0.045, 0.0)]
WILD = 64


def wild(number: int) -> Scene:
    """A hand that darts about at full speed, low over two cubes or a peg and a cube."""
    rng = np.random.default_rng(number)
    base = float(tasks.BASE_X[number % 4])
    middle = base + (0.42 if number % 4 == 3 else 0.55)
    first = Body(
        BOX,
        PEG if number % 3 == 0 else CUBE,
        (middle, rng.uniform(-0.03, 0.03), 0.025 if number % 3 == 0 else 0.02),
        about_z(rng.uniform(0, 6)),
    )
    second = Body(BOX, CUBE, (middle + 0.08, 0.18 * rng.choice([-1, 1]), 0.02), about_z(rng.uniform(0, 6)))
    way = [(0.0, (middle, 0.0, 0.25), OPEN)]
    for step in range(4, STEPS, 4):
        way.append((step, (middle + rng.uniform(-0.1, 0.1), rng.uniform(-0.15, 0.15), rng.uniform(-0.02, 0.07)), rng.choice([OPEN, SHUT])))
    return Scene((first, second), way, rng.uniform(-1, 1), number % 4)


SCENES: dict[str, list[Scene]] = {
    "push": [Scene(one((0, 0, 0.02)), [(0, (-0.05, off, 0.01), SHUT), (20, (0.05, off, 0.01), SHUT)]) for off in PUSHES],
    "grasp": [Scene(one((0, 0, 0.02), turn=about_z(yaw)), grasp((0, 0, 0.02), (0, 0.004, 0)), 0.0) for yaw in YAWS]
    + [Scene(one((0, 0, 0.025), PEG, about_z(yaw / 2)), grasp((0, 0, 0.025), (0, -0.003, 0)), 0.0) for yaw in YAWS],
    "leaning": [Scene(one((0, 0, 0.02), turn=about_z(yaw)), grasp((0, 0, 0.02), depth=-0.008), roll=r) for r in ROLLS for yaw in (0, 0.1)],
    "into the bin": [
        Scene(
            (Body(BALL, BALL_SIZE, (-0.07, 0, 0.02)), Body()),
            [(0, (-0.15, off, 0.012), SHUT), (6, (-0.15, off, 0.012), SHUT), (14, (0.05, off, 0.012), SHUT)],
            bin_at=(0.05, 0, 0),
        )
        for off in INTO_BIN
    ],
    "miss": [Scene(one((0, 0, 0.02)), grasp((0, 0, 0.02), off)) for off in MISSES],
    "stack": [idle(Body(BOX, CUBE, (off, 0, 0.06)), Body(BOX, CUBE, (0, 0, 0.02))) for off in OVERHANGS],
    "tilt": [idle(Body(BOX, PEG, (0, 0, 0.12 * np.cos(t) + 0.025 * np.sin(t)), about_y(-np.pi / 2 + t))) for t in TILTS],
    "drop": [idle(Body(BOX, CUBE, (0, 0, 0.3), about_z(0.3) @ about_y(tilt))) for tilt in (0, 0.3, 0.7, 0.9, 1.5)],
    "bin": [idle(Body(BALL, BALL_SIZE, (0.05 + x, y, 0.06)), bin_at=(0.05, 0, 0)) for x, y in DROPS],
    "wild": [wild(number) for number in range(WILD)],
    "again": [wild(number) for number in range(3)],
}


class Flight(NamedTuple):
    setting: Setting
    states: State  # [STEPS + 1, scenes, ...]
    tools: np.ndarray  # [STEPS + 1, scenes, 4, 4]


def _laid_out(scene: Scene) -> tuple[Setting, State, np.ndarray, np.ndarray]:
    setting, state = tasks.reset(jax.random.key(0), scene.robot, tasks.TASKS.index("PushCube"))
    kind, half, at, turn = (np.array(x) for x in zip(*scene.bodies, strict=True))
    setting = setting._replace(
        kind=kind.astype(np.int32),
        half=half.astype(np.float32),
        bin=np.array(scene.bin_at or (0, 0, 0), np.float32),
        has_bin=np.array(scene.bin_at is not None),
    )
    state = state._replace(position=at.astype(np.float32), rotation=turn.astype(np.float32), opening=np.float32(scene.way[0][2]))
    when = np.arange(STEPS)
    steps = [point[0] for point in scene.way]
    poses = np.broadcast_to(np.eye(4, dtype=np.float32), (STEPS, 4, 4)).copy()
    poses[:, :3, :3] = about_x(scene.roll) @ looking_down(scene.yaw)
    poses[:, :3, 3] = np.stack([np.interp(when, steps, [point[1][i] for point in scene.way]) for i in range(3)], -1)
    openings = np.array([[p[2] for p in scene.way if p[0] <= step][-1] for step in when], np.float32)
    return setting, state, poses, openings


@jax.jit
def _fly(setting: Setting, state: State, poses: jax.Array, openings: jax.Array) -> tuple[State, jax.Array]:
    def begin(setting: Setting, state: State, pose: jax.Array) -> State:
        return state._replace(joints=reach(setting.arm, setting.base, pose, setting.arm.ready, setting.arm.ready, 40)[0])

    def step(setting: Setting, state: State, pose: jax.Array, opening: jax.Array) -> State:
        joints, _ = reach(setting.arm, setting.base, pose, state.joints, setting.arm.ready, 6)
        return physics.step(setting, state, jnp.append(joints, opening))

    def next_step(state: State, wanted: tuple[jax.Array, jax.Array]) -> tuple[State, State]:
        state = jax.vmap(step)(setting, state, *wanted)
        return state, state

    start = jax.vmap(begin)(setting, state, poses[0])
    _, states = jax.lax.scan(next_step, start, (poses, openings))
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)
    tools = jax.vmap(jax.vmap(lambda arm, base, joints: arms.forward(arm, base, joints)[1]), (None, None, 0))
    return states, tools(setting.arm, setting.base, states.joints)


@pytest.fixture(scope="module")
def flights() -> dict[str, Flight]:
    laid_out = [_laid_out(scene) for scenes in SCENES.values() for scene in scenes]
    setting, state, poses, openings = jax.tree.map(lambda *x: np.stack(x), *laid_out)
    states, tools = _fly(setting, state, np.moveaxis(poses, 0, 1), np.moveaxis(openings, 0, 1))
    setting, states, tools = jax.tree.map(np.asarray, (setting, states, tools))
    flights, first = {}, 0
    for name, scenes in SCENES.items():
        part = slice(first, first + len(scenes))
        first += len(scenes)
        flights[name] = Flight(
            jax.tree.map(lambda x, p=part: x[p], setting), jax.tree.map(lambda x, p=part: x[:, p], states), tools[:, part]
        )
    return flights


def yaw_of(states: State, body: int = 0) -> np.ndarray:
    return np.arctan2(states.rotation[..., body, 1, 0], states.rotation[..., body, 0, 0])


# --- an oracle of boxes, by corners and axes in NumPy -------------------------------------------------------------------


def gripper_boxes(flight: Flight) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pads and palm over steps and scenes: (middle [..., 3], axes [..., 3, 3], half [..., 3])."""
    arm, turn, at = flight.setting.arm, flight.tools[..., :3, :3], flight.tools[..., :3, 3]
    aside = flight.states.opening * arm.stroke / 2 + arm.pad[:, 1]
    boxes = []
    for y, z, half in (
        (aside, -arm.pad[:, 2], arm.pad),
        (-aside, -arm.pad[:, 2], arm.pad),
        (0 * aside, -2 * arm.pad[:, 2] - arm.palm[:, 2], arm.palm),
    ):
        place = np.stack(np.broadcast_arrays(0 * aside, y, z), -1)
        boxes.append((at + np.einsum("...ij,...j->...i", turn, place), turn, np.broadcast_to(half, at.shape)))
    return boxes


def body_box(flight: Flight, body: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    at = np.asarray(flight.states.position[..., body, :])
    return at, np.asarray(flight.states.rotation[..., body, :, :]), np.broadcast_to(flight.setting.half[:, body], at.shape)


def overlap(a: tuple, b: tuple) -> np.ndarray:
    """How deep boxes are in each other (negative: apart, at least by that)."""
    axes = [a[1][..., :, i] for i in range(3)] + [b[1][..., :, i] for i in range(3)]
    axes += [np.cross(a[1][..., :, i], b[1][..., :, j]) for i in range(3) for j in range(3)]
    deep = np.full(a[0].shape[:-1], np.inf)
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = [c[..., None, :] + np.einsum("...ij,kj,...j->...ki", r, signs, h) for c, r, h in (a, b)]
    for axis in axes:
        length = np.linalg.norm(axis, axis=-1)
        unit = axis / np.maximum(length, 1e-9)[..., None]
        p, q = (np.einsum("...ki,...i->...k", c, unit) for c in corners)
        depth = np.minimum(p.max(-1) - q.min(-1), q.max(-1) - p.min(-1))
        deep = np.where(length > 1e-3, np.minimum(deep, depth), deep)
    return deep


def lowest(box: tuple) -> np.ndarray:
    return box[0][..., 2] - np.einsum("...i,...i->...", np.abs(box[1][..., 2, :]), box[2])


# --- what holds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["push", "grasp", "miss", "wild"])
def test_nothing_is_deeper_than_a_millimetre_in_anything(flights: dict[str, Flight], group: str) -> None:
    flight = flights[group]
    boxes, bodies = gripper_boxes(flight), [body_box(flight, 0), body_box(flight, 1)]
    there = flight.setting.kind != NOTHING
    for box in boxes:
        assert lowest(box).min() > -1e-3
        for body in (0, 1):
            free = there[:, body] & (flight.states.held != body)
            assert overlap(box, bodies[body])[free].max(initial=-1) < 1e-3
    assert overlap(*bodies)[np.broadcast_to(there[:, 1], flight.states.held.shape)].max(initial=-1) < 1e-3
    for body in (0, 1):
        assert lowest(bodies[body])[:, there[:, body]].min(initial=1) > -1e-3


def test_a_body_moves_only_in_contact(flights: dict[str, Flight]) -> None:
    flight = flights["wild"]
    boxes, bodies = gripper_boxes(flight), [body_box(flight, 0), body_box(flight, 1)]
    went = max(np.linalg.norm(np.diff(box[0], axis=0), axis=-1).max() for box in boxes)
    moved = np.linalg.norm(np.diff(flight.states.position, axis=0), axis=-1) > 1e-5  # [STEPS, scenes, 2]
    assert moved.sum() > 300
    for body in (0, 1):
        near = np.max([overlap(box, bodies[body]) for box in boxes] + [overlap(*bodies)], axis=0)
        held = (flight.states.held[1:] == body) | (flight.states.held[:-1] == body)
        falling = (flight.states.falling[1:, :, body] > 0) | (flight.states.falling[:-1, :, body] > 0)
        step = np.max([np.linalg.norm(np.diff(box[0], axis=0), axis=-1) for box in boxes], axis=0) + 0.03  # a turn of the hand
        apart = np.maximum(near[1:], near[:-1]) < -step
        assert not (moved[..., body] & ~held & ~falling & apart).any()
    assert went < 0.2


def test_a_push_through_the_middle_goes_straight(flights: dict[str, Flight]) -> None:
    states = flights["push"].states
    end = states.position[-1, :4, 0]
    assert np.all(end[:, 0] > 0.078)
    assert np.abs(end[:, 1]).max() < 0.004  # pads no broader than the face: friction carries it along, no more than the offset
    assert np.abs(yaw_of(states)[-1, :4]).max() < 0.01


def limit_surface_yaw(offset: float, way: float) -> float:
    """How far a cube turns as the corner of a pusher goes `way` along x, at `offset` from its middle: fine steps of force and twist."""
    half = 0.02
    nodes = (np.arange(400) + 0.5) / 400 * 2 - 1
    arm = half * np.mean(np.hypot(*np.meshgrid(nodes, nodes)))  # of the torque that turns it
    centre, yaw, steps = np.zeros(2), 0.0, 4000
    tip = np.array([-half, offset])
    for _ in range(steps):
        face = np.array([np.cos(yaw), np.sin(yaw)])  # inward normal of the pushed face
        side = np.array([-face[1], face[0]])
        u = np.array([way / steps, 0])
        r = tip - centre
        twist_of = np.array([[1, 0], [0, 1], [-r[1] / arm**2, r[0] / arm**2]])  # force to (v, w)
        velocity_of = np.array([[1, 0, -r[1]], [0, 1, r[0]]])
        force = np.linalg.solve(velocity_of @ twist_of, u)
        if abs(force @ side) > physics.FRICTION * (force @ face):
            edge = face + np.sign(force @ side) * physics.FRICTION * side
            force = edge * (u @ face) / (face @ velocity_of @ twist_of @ edge)
        twist = twist_of @ force
        centre, yaw, tip = centre + twist[:2], yaw + twist[2], tip + u
        tip = tip - face * ((tip - centre) @ np.array([np.cos(yaw), np.sin(yaw)]) + half)  # stays on the face
    return yaw


@pytest.mark.parametrize("number", [4, 5])
def test_a_push_beside_the_middle_turns_as_the_limit_surface_says(flights: dict[str, Flight], number: int) -> None:
    flight = flights["push"]
    broad = float(flight.setting.arm.pad[number, 1]) * 2
    corner = PUSHES[number] - np.sign(PUSHES[number]) * broad
    x = flight.tools[:, number, 0, 3] + flight.setting.arm.pad[number, 0]
    step = int(np.argmax(x > -0.008))
    yaw = yaw_of(flight.states)[step, number]
    assert np.sign(yaw) == -np.sign(PUSHES[number])
    assert yaw == pytest.approx(limit_surface_yaw(corner, x[step] + 0.02), rel=0.06)


def test_closing_pads_turn_a_body_flat_and_hold_it(flights: dict[str, Flight]) -> None:
    flight = flights["grasp"]
    assert np.all(flight.states.held[20:36] == 0)
    quarter = np.concatenate([np.full(12, np.pi / 2), np.full(12, np.pi)])
    off = (yaw_of(flight.states)[30] + quarter / 2) % quarter - quarter / 2
    assert np.abs(off).max() < 0.02
    width = np.where(np.arange(24) < 12, 0.04, 0.05)
    np.testing.assert_allclose(flight.states.opening[30] * flight.setting.arm.stroke, width, atol=5e-4)
    assert flight.states.position[36, :, 0, 2].min() > 0.19


def test_pads_that_lean_hold_a_body_by_their_edges(flights: dict[str, Flight]) -> None:
    flight = flights["leaning"]
    held = flight.states.held == 0
    assert np.all(held[24:36])
    for box in gripper_boxes(flight):
        assert overlap(box, body_box(flight, 0))[held].max() < 1e-3


def test_a_ball_is_not_pushed_through_the_bins_walls(flights: dict[str, Flight]) -> None:
    flight = flights["into the bin"]
    at = flight.states.position[:, :, 0]
    assert np.all(at[-1, :3, 0] > 0)  # it was pushed there, but for one that slipped aside,
    assert np.all(at[-1, :, 0] < 0.025) and np.abs(at[..., 2] - 0.02).max() < 1e-3  # and is not in there
    gap, _ = contact.out_of_bin(jnp.moveaxis(jnp.asarray(at), -1, 0), jnp.float32(0.02), jnp.array([0.05, 0, 0])[:, None, None])
    assert gap.min() > -1e-3


def test_a_held_body_keeps_its_pose_in_the_hand(flights: dict[str, Flight]) -> None:
    flight = flights["grasp"]
    tool, at, turn = flight.tools[20:36], flight.states.position[20:36, :, 0], flight.states.rotation[20:36, :, 0]
    place = np.einsum("tsji,tsj->tsi", tool[..., :3, :3], at - tool[..., :3, 3])
    pose = np.einsum("tsji,tsjk->tsik", tool[..., :3, :3], turn)
    assert np.abs(place - place[:1]).max() < 2e-6
    assert np.abs(pose - pose[:1]).max() < 2e-5


def test_opening_lets_it_fall_to_the_table(flights: dict[str, Flight]) -> None:
    flight = flights["grasp"]
    high = flight.setting.half[:, 0, 2]
    assert np.all(flight.states.held[39:] == -1)
    np.testing.assert_allclose(flight.states.position[-1, :, 0, 2], high, atol=1e-4)
    assert np.all(flight.states.falling[-1, :, 0] == 0)
    falls = flight.states.position[36, :, 0, 2] - flight.states.position[40, :, 0, 2]
    assert falls.min() > 0.02 and falls.max() < 0.5 * 9.81 * (4 / HZ) ** 2


def test_a_gripper_a_centimetre_off_never_grasps(flights: dict[str, Flight]) -> None:
    flight = flights["miss"]
    assert np.all(flight.states.held == -1)
    assert np.abs(flight.states.position[..., 0, :] - np.array([0, 0, 0.02])).max() < 1e-6


def test_a_stack_stays_and_what_overhangs_comes_down(flights: dict[str, Flight]) -> None:
    states = flights["stack"].states
    stays = np.array(OVERHANGS) < 0.02
    end = states.position[-1, :, 0]
    np.testing.assert_allclose(end[stays], states.position[0, stays, 0], atol=1e-5)
    np.testing.assert_allclose(end[~stays, 2], 0.02, atol=1e-4)
    assert np.all(end[~stays, 0] >= 0.04 - 1e-4)
    np.testing.assert_allclose(states.position[-1, :, 1], [[0, 0, 0.02]] * len(OVERHANGS), atol=1e-6)


def test_a_peg_stands_up_to_its_critical_angle(flights: dict[str, Flight]) -> None:
    states = flights["tilt"].states
    critical = np.arctan(PEG[1] / PEG[0])
    stands = np.abs(states.rotation[-1, :, 0, 2, 0]) > 0.9999
    assert list(stands) == [tilt < critical for tilt in TILTS]
    high = states.position[-1, :, 0, 2]
    np.testing.assert_allclose(high, np.where(stands, PEG[0], PEG[1]), atol=1e-4)


def test_what_is_dropped_comes_to_lie_on_a_face(flights: dict[str, Flight]) -> None:
    flight = flights["drop"]
    end = flight.states.rotation[-1, :, 0, 2]
    np.testing.assert_allclose(np.abs(end).max(-1), 1, atol=1e-5)
    np.testing.assert_allclose(flight.states.position[-1, :, 0, 2], 0.02, atol=1e-4)


def test_a_ball_settles_in_the_bin(flights: dict[str, Flight]) -> None:
    flight = flights["bin"]
    end = flight.states.position[-1, :, 0] - np.array([0.05, 0, contact.BALL_IN_BIN])
    inside = slice(0, 4)
    assert np.abs(end[inside, 2]).max() < 1e-3
    assert np.linalg.norm(end[inside, :2], axis=-1).max() < 0.005
    assert np.all(flight.states.falling[-1, :, 0] == 0)
    assert end[4, 2] == pytest.approx(0.02 - contact.BALL_IN_BIN, abs=1e-4)  # beside it, on the table


def test_it_knows_where_the_tool_is() -> None:
    joints = jax.random.uniform(jax.random.key(3), (4, 7), minval=-1, maxval=1)
    base = jnp.array([-0.5, 0.1, 0.0])
    for robot in range(4):
        arm = arms.arm_of(robot)
        frames, tool = arms.forward(arm, base, joints[robot])
        at, turn, places, axes = physics.reached(arm, base, joints[robot])
        np.testing.assert_allclose(at, tool[:3, 3], atol=1e-6)
        np.testing.assert_allclose(turn, tool[:3, :3], atol=1e-6)
        np.testing.assert_allclose(places, frames[:, :3, 3], atol=1e-6)
        np.testing.assert_allclose(axes, jnp.einsum("jab,jb->ja", frames[:, :3, :3], arm.axes), atol=1e-6)


def test_touching_agrees_with_the_oracle() -> None:
    rng = np.random.default_rng(0)
    many = 4000
    turns = np.linalg.qr(rng.normal(size=(2, many, 3, 3)))[0]
    turns *= np.sign(np.linalg.det(turns))[..., None, None]
    halves, centres = rng.uniform(0.003, 0.06, (2, many, 3)), rng.uniform(-0.06, 0.06, (2, many, 3))
    a, b = ((c, r, h) for c, r, h in zip(centres, turns, halves, strict=True))
    solids = [
        contact.Solid(
            jnp.asarray(c.T, jnp.float32), jnp.asarray(np.moveaxis(r, 0, -1), jnp.float32), jnp.asarray(h.T, jnp.float32), jnp.zeros(many)
        )
        for c, r, h in (a, b)
    ]
    found = contact.touch(solids[0], solids[1], jnp.zeros((3, many)))
    np.testing.assert_allclose(-found.gap, overlap(a, b), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found.normal, axis=0), 1, atol=1e-4)


def test_a_ball_whose_middle_is_in_a_box_comes_out_of_a_face() -> None:
    rng = np.random.default_rng(1)
    turns = np.moveaxis(np.linalg.qr(rng.normal(size=(4000, 3, 3)))[0], 0, -1)
    half, middle = rng.uniform(0.003, 0.06, (3, 4000)), rng.uniform(-0.5, 0.5, (3, 4000))
    within = middle + np.einsum("ijk,jk->ik", turns, rng.uniform(-1, 1, half.shape) * half)
    box = contact.Solid(*(jnp.asarray(x, jnp.float32) for x in (middle, turns, half, np.zeros(4000))))
    ball = contact.Solid(*(jnp.asarray(x, jnp.float32) for x in (within, turns, 0 * half, np.full(4000, 0.02))))
    found = contact.touch(box, ball, jnp.zeros((3, 4000)))
    np.testing.assert_allclose(np.linalg.norm(found.normal, axis=0), 1, atol=1e-4)
    assert found.gap.max() < -0.02 + 1e-5


def test_an_episode_does_not_depend_on_its_place_in_the_batch(flights: dict[str, Flight]) -> None:
    first, again = flights["wild"].states, flights["again"].states
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, :3], b), first, again)


def test_one_episode_and_batches_of_batches_have_the_same_shapes() -> None:
    setting, state = tasks.reset(jax.random.key(2), 1, 0)
    action = jnp.zeros(8)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(physics.step, setting, state, action)) == shapes
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), (setting, state, action))
    after = jax.eval_shape(jax.vmap(jax.vmap(physics.step)), *many)
    assert jax.tree.map(lambda x: (x.shape[2:], x.dtype), after) == shapes


def test_what_is_no_number_means_to_stay_and_what_is_too_much_the_limit() -> None:
    setting, state = tasks.reset(jax.random.key(0), 0, tasks.PICK)
    actions = np.full((3, JOINTS + 1), np.nan, np.float32)
    actions[1], actions[2] = np.inf, -np.inf
    after = jax.jit(jax.vmap(physics.step, (None, None, 0)))(setting, state, actions)
    np.testing.assert_array_equal(after.joints[0], state.joints)
    assert after.opening[0] == state.opening
    for row, sign in ((1, 1), (2, -1)):
        np.testing.assert_allclose((after.joints[row] - state.joints), sign * setting.arm.speed / HZ, atol=1e-5)
    np.testing.assert_array_equal(after.position, np.broadcast_to(state.position, after.position.shape))


def test_the_friction_arm_is_a_mean_distance() -> None:
    nodes = (np.arange(500) + 0.5) / 500 * 2 - 1
    for a, b in ((0.02, 0.02), (0.12, 0.025), (0.03, 0.01)):
        x, y = np.meshgrid(a * nodes, b * nodes)
        assert float(contact.friction_arm(jnp.float32(a), jnp.float32(b))) == pytest.approx(np.hypot(x, y).mean(), rel=1e-4)
