"""How each task is done well: a plan of eight phases from what lies where, and a step along it from where the hand is.

A phase is a pose of the tool and an opening of the gripper. The hand goes from wherever it is towards its phase's pose, the slower the
nearer it is, and the next phase begins when it is there. A policy sees a moment and no phase, so what is done should follow from where
things are: a hand comes down in a funnel, the lower the less it is aside; it closes, or slides, once it is where that works, not only
where it was to come down; it begins anew as soon as what it grasps or slides is not before it; and it has no pace to gain first. Tasks
differ in their tables and poses only; one program does them all, for any arm:

    phase          0      1       2       3       4          5        6         7
    grasp tasks    above  down    close   lift    carry      place    open      leave       (PickCube stays in 5)
    push, pull     above  down    close   slide                                             (they stay in 3)

Pads that slide a cube stand a little apart, and more so where they pull: it turns away from before a narrow hand that is some millimetres
aside. A body that is lost, or slid past, is fetched from where it lies then. A peg is grasped near the end that the arm can turn up:
hands that can look back when they are level take the near end; WidowX's, which only looks ahead, takes the far one.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.evaluate.world.arms import about, apply, forward, times
from blm_jax.evaluate.world.contact import BALL_IN_BIN
from blm_jax.evaluate.world.ik import pose_error, reach
from blm_jax.evaluate.world.scene import HZ, NOTHING, Setting, State
from blm_jax.evaluate.world.tasks import LIFT, PICK, PLACE, STACK, succeeded

ABOVE, DOWN, CLOSE, RAISE, CARRY, PUT, OPEN, LEAVE = range(8)
PHASES = 8
LAST = np.array([PUT, RAISE, RAISE, LEAVE, LEAVE, LEAVE])  # [tasks] the phase that a task stays in
# [tasks] metres between the pads of a hand that slides a cube, which turns away from before narrow ones; 0 where it grasps.
SPREAD = np.array([0, 0.012, 0.024, 0, 0, 0], np.float32)
SLIDES = SPREAD > 0

OVER = 0.06  # metres above: where a hand comes from, and a picked cube
LOW = 0.008  # below a cube's middle, where it is slid: over it none of the hand must pass, and on the table an arm at its limit scrapes
TUCK = 0.012  # how far below a body's middle the tips grasp it
SHORT = 0.07  # of the goal's middle: where a push or a pull ends; further on an xArm that pushes is out of reach
BESIDE = 0.035  # of a cube, where the hand that pushes it comes down
FUNNEL, FREE = 2.0, 0.01  # metres up for each aside, but for the first ones
STRAY = 0.015  # beside where it grasps, from which on a hand that closes comes down anew
SLIP = 0.012  # past a cube's near face, from which on a hand does not slide it
ASIDE = 0.01  # of the cube's middle, at which a slide may begin; it may go on at twice as much
END = 0.05  # from a peg's end: where it is grasped
CLEAR = 0.003  # of what a thing is put on
BACKED = 0.06  # how far a hand draws back from what it has put down
LEVEL_AHEAD, LEVEL_BACK = 0.5, 0.3  # from the base: nearest and furthest that arms hold a hand that looks ahead, and back

# What a phase wants, by phase: metres a second at most, and how near it is to be done, in metres and radians.
SPEED = np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3, 0.4], np.float32)
NEAR = np.array([0.03, 0.006, 0.02, 0.02, 0.015, 0.002, 0.005, 0.002], np.float32)
TURNED = np.array([0.3, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6], np.float32)
NEAR_END = 0.002  # of a peg, where it is grasped
TURNED_UPRIGHT = 0.02  # a peg, before it is put down
SLIDING = 0.3  # metres a second of a push or a pull
HASTE = 2.5  # metres a second, each second: how quickly a hand stops
EASE = 6.0  # of what is left, a second, at most, in PickCube: a hand that covers millimetres in one step trembles, and must be still there
SPIN, SPIN_HASTE = 2.5, 12.0  # radians a second, each second
PART = 0.8  # of the joints' greatest speed
PATIENCE = 20  # steps that a gripper has to close or open
ITERATIONS = 4  # of the inverse kinematics from where the arm is; from its ready pose:
ITERATIONS_AFAR = 16
STEADY = 0.5  # how much of an offset the next one keeps
TURNING = 0.03  # beside place: out of reach of a hand that looks down, it leans


class Memory(NamedTuple):
    """What an expert carries from step to step."""

    phase: jax.Array  # [] int32
    waited: jax.Array  # [] int32 steps in it
    pace: jax.Array  # [] metres a second of the last step
    place: jax.Array  # [PHASES, 3] of the tool
    turn: jax.Array  # [PHASES, 3, 3]
    body: jax.Array  # [3] the wanted body, when the plan was last told of it
    grip: jax.Array  # [3] that body in the tool's frame once it is grasped


def hand(yaw: jax.Array, lean: jax.Array) -> jax.Array:
    """The rotation [3, 3] of a tool whose x looks along a yaw; it leans so that its z, which looks down, comes up towards that."""
    ahead = jnp.stack([jnp.cos(yaw), jnp.sin(yaw), jnp.zeros_like(yaw)])
    up = jnp.array([0.0, 0, 1])
    c, s = jnp.cos(lean), jnp.sin(lean)
    return jnp.stack([c * ahead + s * up, jnp.stack([ahead[1], -ahead[0], jnp.zeros_like(yaw)]), s * ahead - c * up], axis=-1)


def _pose(place: jax.Array, turn: jax.Array) -> jax.Array:
    return jnp.eye(4).at[:3, :3].set(turn).at[:3, 3].set(place)


def _azimuth(setting: Setting, place: jax.Array) -> jax.Array:
    return jnp.arctan2(place[1] - setting.base[1], place[0] - setting.base[0])


def _from_ready(setting: Setting, place: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tool [4, 4] that the arm brings to a pose as well as it can, and the angle that is left."""
    arm = setting.arm
    joints, left = reach(arm, setting.base, _pose(place, turn), arm.ready, arm.ready, ITERATIONS_AFAR, TURNING)
    return forward(arm, setting.base, joints)[1], left[1]


def _lean_at(setting: Setting, place: jax.Array) -> jax.Array:
    """How far a hand that should look down must lean out to get to a place."""
    azimuth = _azimuth(setting, place)
    tool, _ = _from_ready(setting, place, hand(azimuth, jnp.float32(0)))
    out = tool[0, 2] * jnp.cos(azimuth) + tool[1, 2] * jnp.sin(azimuth)
    lean = jnp.arctan2(out, -tool[2, 2])
    return jnp.where(jnp.abs(lean) < 0.02, 0.0, lean)


def _grasp_yaw(setting: Setting, state: State) -> jax.Array:
    """The yaw of a hand whose pads meet two faces of the wanted body, and no other body on their way.

    A cube that is only picked up is grasped as it comes: closing pads turn it, and its yaw is hard to see.
    """
    at, rotation = state.position[setting.wanted], state.rotation[setting.wanted]
    azimuth = _azimuth(setting, at)
    quarter = jnp.pi / 2
    off = jnp.arctan2(rotation[1, 0], rotation[0, 0]) - azimuth
    off = off - quarter * jnp.round(off / quarter)
    yaw = azimuth + off
    way = state.position[1 - setting.wanted] - at
    across = jnp.abs(way[0] * jnp.sin(yaw) - way[1] * jnp.cos(yaw))  # along the line of the pads
    distance = jnp.sqrt(jnp.sum(way[:2] ** 2))
    blocked = (setting.kind[1 - setting.wanted] != NOTHING) & (distance < 0.12) & (across > 0.7 * distance)
    yaw = jnp.where(blocked, yaw - quarter * jnp.where(off > 0, 1.0, -1.0), yaw)
    return jnp.where((setting.task == PLACE) | (setting.task == PICK), azimuth, yaw)


class Carriage(NamedTuple):
    """How a body is carried: what tells one grasping task from another."""

    place: jax.Array  # [3] of the tool, where it grasps
    turn: jax.Array  # [3, 3]
    put_turn: jax.Array  # [3, 3] where it puts down
    wished: jax.Array  # [3] of the body in the end
    raised: jax.Array  # [] metres straight up, first
    carried: jax.Array  # [] metres above where it is put down


def _of_cube_or_ball(setting: Setting, state: State) -> Carriage:
    """Grasped with the hand as upright as the arm allows; a cube that is put down must lie as it was grasped."""
    task, up, other = setting.task, jnp.array([0.0, 0, 1]), 1 - setting.wanted
    at = state.position[setting.wanted]
    stacked = state.position[other] + up * (setting.half[other, 2] + setting.half[setting.wanted, 2] + CLEAR)
    in_bin = setting.bin + up * (BALL_IN_BIN + CLEAR)
    wished = jnp.select([task == PICK, task == STACK], [setting.goal, stacked], in_bin)
    place = at - up * TUCK
    lean, put_lean = jax.vmap(partial(_lean_at, setting))(jnp.stack([place, wished - up * TUCK]))
    both = jnp.maximum(lean, put_lean)
    return Carriage(
        place=place,
        turn=hand(_grasp_yaw(setting, state), jnp.where(task == STACK, both, lean)),
        put_turn=hand(_azimuth(setting, wished), jnp.where(task == STACK, both, put_lean)),
        wished=wished,
        raised=jnp.where(task == PICK, 0.0, 0.06),
        carried=jnp.where(task == PICK, 0.0, 0.045),
    )


def _of_peg(setting: Setting, state: State) -> Carriage:
    """Grasped near one end or the other, whichever the arm can turn up."""
    up, base_x = jnp.array([0.0, 0, 1]), setting.base[0]
    at, half = state.position[setting.wanted], setting.half[setting.wanted, 0]
    long_axis = state.rotation[setting.wanted][:, 0]
    yaw = jnp.arctan2(long_axis[1], long_axis[0])
    yaw = yaw - jnp.pi * jnp.round(yaw / jnp.pi)
    lever = half - END
    ahead = jnp.stack([base_x + jnp.maximum(at[0] + lever - base_x, LEVEL_AHEAD), at[1], half + lever])
    back = ahead.at[0].set(base_x + jnp.minimum(at[0] - lever - base_x, LEVEL_BACK))
    _, left = _from_ready(setting, back, hand(yaw, jnp.float32(-jnp.pi / 2)))
    side = jnp.where(left < TURNED_UPRIGHT, -1.0, 1.0)
    place = at + jnp.stack([jnp.cos(yaw), jnp.sin(yaw), jnp.zeros_like(yaw)]) * lever * side - up * TUCK
    turn, put_turn = hand(yaw, jnp.float32(0)), hand(yaw, side * jnp.pi / 2)
    wished = jnp.where(side > 0, ahead, back) + apply(put_turn, apply(turn.T, at - place))
    return Carriage(place, turn, put_turn, wished.at[2].set(half + CLEAR), jnp.float32(0.13), jnp.float32(0.015))


def _spread(setting: Setting) -> jax.Array:
    """How open the gripper is of a hand that slides a cube."""
    return jnp.asarray(SPREAD)[setting.task] / setting.arm.stroke


def _sliding(setting: Setting, state: State) -> tuple[jax.Array, jax.Array]:
    """Places [PHASES, 3] and turns of a hand that comes down behind a cube, or beyond it, and slides it."""
    up, at = jnp.array([0.0, 0, 1]), state.position[setting.wanted]
    way = (setting.goal - at) * jnp.array([1.0, 1, 0])
    way = way / jnp.maximum(jnp.linalg.norm(way), 1e-6)
    behind = setting.half[setting.wanted, 0] + setting.arm.pad[0]
    start = at - way * (behind + BESIDE) - up * LOW
    end = (setting.goal - way * (SHORT + behind)).at[2].set(start[2])
    places = jnp.stack([start + up * OVER, start, start] + [end] * (PHASES - RAISE))
    yaw = jnp.arctan(way[1] / jnp.where(jnp.abs(way[0]) < 1e-3, 1e-3, way[0]))
    return places, jnp.broadcast_to(hand(yaw, jnp.float32(0)), (PHASES, 3, 3))


def begin(setting: Setting, state: State) -> Memory:
    """The plan, from what lies where."""
    up, at = jnp.array([0.0, 0, 1]), state.position[setting.wanted]
    way = jax.tree.map(partial(jnp.where, setting.task == LIFT), _of_peg(setting, state), _of_cube_or_ball(setting, state))
    grip = apply(way.turn.T, at - way.place)
    put = way.wished - apply(way.put_turn, grip)
    places = [way.place + up * OVER, way.place, way.place, way.place + up * way.raised]
    places += [put + up * way.carried, put, put, put - way.put_turn[:, 2] * BACKED]
    grasping = jnp.stack(places), jnp.stack([way.turn] * 4 + [way.put_turn] * 4)
    slides = jnp.asarray(SLIDES)[setting.task]
    place, turn = jax.tree.map(partial(jnp.where, slides), _sliding(setting, state), grasping)
    return Memory(jnp.int32(ABOVE), jnp.int32(0), jnp.float32(0), place, turn, at, grip)


def _followed(setting: Setting, state: State, memory: Memory) -> Memory:
    """The plan with what comes before the body is held, or slid, where the body is now."""
    slides = jnp.asarray(SLIDES)[setting.task]
    grasps = ~slides & (memory.phase <= CLOSE) & (state.held != setting.wanted)
    moved = (state.position[setting.wanted] - memory.body) * jnp.array([1.0, 1, 0]) * grasps
    place = memory.place + (jnp.arange(PHASES) < CARRY)[:, None] * moved
    anew = slides & (memory.phase <= DOWN)
    place, turn = jax.tree.map(partial(jnp.where, anew), _sliding(setting, state), (place, memory.turn))
    return memory._replace(place=place, turn=turn, body=memory.body + moved)


def _target(setting: Setting, state: State, memory: Memory, tool: jax.Array) -> jax.Array:
    """The tool's pose [4, 4] that the phase wants, with the body as it is held."""
    phase = memory.phase
    turn = memory.turn[phase]
    carries = (state.held == setting.wanted) & (phase >= CARRY)
    slipped = jnp.where(carries, apply(turn, memory.grip - state.grip_position), 0.0)
    comes, brings = phase <= DOWN, (setting.task == PICK) & (phase >= CARRY)  # a cube is picked up on the way, in a bow
    place = memory.place[jnp.where(comes, DOWN, phase)] + slipped
    aside = jnp.linalg.norm((tool[:3, 3] - place)[:2])
    over = jnp.where(comes, jnp.clip(FUNNEL * (aside - FREE), 0, OVER), jnp.where(brings, jnp.clip(aside - FREE, 0, OVER), 0.0))
    return _pose(place.at[2].add(over), turn)


def _done(setting: Setting, state: State, memory: Memory, tool: jax.Array, error: jax.Array) -> jax.Array:
    """Whether the phase is over, `error` [6] being the way to its pose."""
    phase, task = memory.phase, setting.task
    turned = jnp.where((task == LIFT) & (phase == CARRY), TURNED_UPRIGHT, jnp.asarray(TURNED)[phase])
    near = jnp.where((task == LIFT) & (phase == DOWN), NEAR_END, jnp.asarray(NEAR)[phase])
    there = (jnp.linalg.norm(error[:3]) < near) & (jnp.linalg.norm(error[3:]) < turned)
    slides = jnp.asarray(SLIDES)[task]
    there = there | (slides & (phase <= DOWN) & _has_before(setting, state, memory, tool, 1.0))
    closed = jnp.where(slides, jnp.abs(state.opening - _spread(setting)) < 0.05, state.held == setting.wanted)
    gripper = jnp.where(phase == CLOSE, closed, jnp.where(phase == OPEN, (state.held < 0) & (state.opening > 0.7), True))
    return (there & gripper) | (((phase == CLOSE) | (phase == OPEN)) & (memory.waited >= PATIENCE))


def _next_phase(setting: Setting, state: State, memory: Memory, tool: jax.Array) -> Memory:
    """On to the next phase if one is over, back to the first if the body was lost or is not where it was to be."""
    phase, task = memory.phase, setting.task
    slides = jnp.asarray(SLIDES)[task]
    over = _done(setting, state, memory, tool, pose_error(tool, _target(setting, state, memory, tool)))
    onward = over & (phase < jnp.asarray(LAST)[task])
    lost = ~slides & (phase >= RAISE) & (phase <= PUT) & (state.held != setting.wanted)
    missed = slides & (phase == RAISE) & over & ~succeeded(setting, state)
    new = jnp.where(lost | missed | _strayed(setting, state, memory, tool), ABOVE, phase + onward)
    return memory._replace(phase=new, waited=jnp.where(new == phase, memory.waited + 1, 0))


def _strayed(setting: Setting, state: State, memory: Memory, tool: jax.Array) -> jax.Array:
    """Whether the hand closes beside the body, or slides without having the cube before it."""
    slides = jnp.asarray(SLIDES)[setting.task]
    off = jnp.abs(tool[:3, 3] - memory.place[DOWN])
    beside = ~slides & (memory.phase == CLOSE) & (state.held != setting.wanted) & (jnp.max(off) > STRAY)
    return beside | (slides & (memory.phase == RAISE) & ~_has_before(setting, state, memory, tool, 2.0) & ~succeeded(setting, state))


def _has_before(setting: Setting, state: State, memory: Memory, tool: jax.Array, slack: float) -> jax.Array:
    """Whether a hand that slides a cube is where it can go on to do so: low and behind it, on its way."""
    way = (memory.place[RAISE] - memory.place[DOWN]) * jnp.array([1.0, 1, 0])
    way = way / jnp.maximum(jnp.linalg.norm(way), 1e-6)
    off = tool[:3, 3] - state.position[setting.wanted]
    ahead = jnp.sum(off * way) + setting.half[setting.wanted, 0] + setting.arm.pad[0]
    across = jnp.abs(off[0] * way[1] - off[1] * way[0])
    return (ahead < SLIP) & (ahead > -2 * BESIDE) & (across < slack * ASIDE) & (jnp.abs(off[2] + LOW) < slack * ASIDE)


def _stride(setting: Setting, memory: Memory, tool: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tool's pose [4, 4] a step further on the straight way to a target, and its pace."""
    phase = memory.phase
    sliding = jnp.asarray(SLIDES)[setting.task] & (phase == RAISE)
    error = pose_error(tool, target)
    way, angle = jnp.linalg.norm(error[:3]), jnp.linalg.norm(error[3:])
    fastest = jnp.where(sliding, SLIDING, jnp.asarray(SPEED)[phase])
    passing = (phase == RAISE) & ~sliding
    left = jnp.where(phase <= DOWN, jnp.linalg.norm(memory.place[DOWN] - tool[:3, 3]), way)
    picks = setting.task == PICK
    stopping = jnp.where(passing, fastest, jnp.minimum(jnp.sqrt(2 * HASTE * left), jnp.where(picks, EASE * left, jnp.inf)))
    pace = jnp.minimum(fastest, stopping)
    spin = jnp.minimum(SPIN, jnp.minimum(jnp.sqrt(2 * SPIN_HASTE * angle), jnp.where(picks, EASE * angle, jnp.inf)))
    part = jnp.minimum(1.0, pace / HZ / jnp.maximum(way, 1e-6))
    part_turned = jnp.minimum(1.0, spin / HZ / jnp.maximum(angle, 1e-6))
    together = (setting.task == LIFT) & (phase == CARRY)  # else the peg's end would hit the table
    slower = jnp.minimum(part, part_turned)
    part, part_turned = jnp.where(together, slower, part), jnp.where(together, slower, part_turned)
    turn = about(error[3:] / jnp.maximum(angle, 1e-6), part_turned * angle)
    return _pose(tool[:3, 3] + part * error[:3], times(turn, tool[:3, :3])), part * way * HZ


def act(setting: Setting, state: State, memory: Memory) -> tuple[jax.Array, Memory]:
    """The next action [JOINTS + 1]."""
    arm = setting.arm
    _, tool = forward(arm, setting.base, state.joints)
    memory = _next_phase(setting, state, _followed(setting, state, memory), tool)
    wanted, pace = _stride(setting, memory, tool, _target(setting, state, memory, tool))
    joints, _ = reach(arm, setting.base, wanted, state.joints, arm.ready, ITERATIONS, TURNING)
    change = joints - state.joints
    most = jnp.max(jnp.abs(change) / jnp.maximum(arm.speed * PART / HZ, 1e-6))
    joints = state.joints + change / jnp.maximum(most, 1.0)
    grasps = (memory.phase >= CLOSE) & (memory.phase <= PUT)
    opening = jnp.where(jnp.asarray(SLIDES)[setting.task], _spread(setting), jnp.where(grasps, 0.0, 1.0))
    return jnp.append(joints, opening), memory._replace(pace=pace)


def drifted(memory: Memory, off: jax.Array, key: jax.Array, noise: jax.Array | float) -> jax.Array:
    """The next of a row of small offsets [JOINTS], of `noise` radians each where the hand is fastest, of less where it is slow.

    Added to what is executed and not to what is recorded, they lead to places from which the recorded action shows the way back.
    """
    return STEADY * off + noise * memory.pace / np.max(SPEED) * jax.random.normal(key, off.shape)
