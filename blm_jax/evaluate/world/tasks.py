"""Six tasks: how an episode begins, what is asked, and when it has succeeded.

Places, sizes and rules are ManiSkill 3's (PickCube-v1, PushCube-v1, PullCube-v1, StackCube-v1, PlaceSphere-v1, LiftPegUpright-v1).
Ours are: colours, drawn from a palette, as the instruction names them; and a second cube in the first three tasks, if one is wished, as
large as the first and in the same box, that only the instruction tells from it. The goal of a push or pull would tell as well, so it is
not seen then. A peg's tilt is measured as an angle from upright: ManiSkill's Euler angle says the same of a peg that tips about one axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.evaluate.world.arms import arm_of
from blm_jax.evaluate.world.contact import BALL_IN_BIN, turned
from blm_jax.evaluate.world.scene import BALL, BODIES, BOX, NOTHING, Setting, State

TASKS = ("PickCube", "PushCube", "PullCube", "StackCube", "PlaceSphere", "LiftPegUpright")
PICK, PUSH, PULL, STACK, PLACE, LIFT = range(len(TASKS))
# Steps of an episode in evaluation: 1.5 times the experts' 95th percentile (32, 33, 24, 42, 34, 44) and the half second that success
# must hold, in whole chunks of eight.
MAY_BE_TWO = (PICK, PUSH, PULL)  # cubes, if one is wished
LIMITS = (64, 64, 48, 80, 64, 80)

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
PALETTE = np.array(
    [
        (0.85, 0.05, 0.05),
        (0.05, 0.65, 0.1),
        (0.05, 0.15, 0.85),
        (0.95, 0.85, 0.05),
        (0.5, 0.05, 0.7),
        (1, 0.45, 0),
        (0, 0.75, 0.8),
        (1, 0.4, 0.7),
    ],
    np.float32,
)

CUBE = 0.02  # half a side, and the ball's radius
PEG = (0.12, 0.025, 0.025)
WIDOWX = 3  # of arms.ROBOTS: a short arm, with a smaller cube and a box of its own in PickCube
BASE_X = np.array([-0.615, -0.522, -0.522, -0.3], np.float32)  # [robots]

# Boxes that middles are drawn from, by task: (x, y) of the first body, (x, y) of the other one.
BOXES_LOW = np.array([[[-0.1, -0.1]] * 2] * 3 + [[[-0.1, -0.2]] * 2, [[-0.1, -0.1], [0, -0.1]], [[-0.1, -0.1]] * 2], np.float32)
BOXES_HIGH = np.array([[[0.1, 0.1]] * 2] * 3 + [[[0.1, 0.2]] * 2, [[-0.05, 0.1], [0.1, 0.1]], [[0.1, 0.1]] * 2], np.float32)
# In PickCube, ManiSkill has WidowX's base at -0.615 and its box around -0.25: both 0.315 further back, before a camera of their own.
WIDOWX_PICK = (np.array([0.015, -0.05], np.float32), np.array([0.115, 0.05], np.float32))

TRIES = 64  # at two places far enough apart
APART_STACKED = 2 * (2**0.5 * CUBE + 0.001)  # as ManiSkill's sampler has it
APART_PICKED = (0.09, 0.065)  # room for a finger; on WidowX's smaller box
APART_PUSHED = 0.07  # in y, so that neither cube stands in the other's lane

PICKED = 0.025  # from the goal, at most
SMALL_PICKED = 0.0225
REACHED = 0.1
STILL = 0.2  # radians a second of any joint
BODY_STILL = 0.01  # metres a second


def reset(key: jax.Array, robot: jax.Array | int, task: jax.Array | int, other: jax.Array | bool = False) -> tuple[Setting, State]:
    """An episode's beginning. `other` puts a second cube beside the first of PickCube, PushCube and PullCube."""
    robot, task = jnp.asarray(robot, jnp.int32), jnp.asarray(task, jnp.int32)
    places, turns, goals, colours, choice, noise = jax.random.split(key, 6)
    cubes = task <= PULL  # that another may lie beside
    small = (robot == WIDOWX) & (task == PICK)
    two = (task == STACK) | (cubes & other)

    first = jnp.where(task == PLACE, BALL, BOX)
    kind = jnp.stack([first, jnp.where(two, BOX, NOTHING)]).astype(jnp.int32)
    side = jnp.where(small, 0.018, CUBE)
    half = jnp.where(task == LIFT, jnp.asarray(PEG), side)
    half = jnp.stack([half, jnp.where(two, side, 0.0) * jnp.ones(3)])

    spot = _places(places, task, small, two)  # [2, 2]
    yaw = jnp.where((task == PICK) | (task == STACK), jax.random.uniform(turns, (BODIES,), maxval=2 * jnp.pi), 0.0)
    wanted = jnp.where(cubes & other, jax.random.randint(choice, (), 0, 2), 0)
    low, high = _box(task, small)
    goal_pick = jax.random.uniform(goals, (3,), minval=jnp.append(low[0], 0.0), maxval=jnp.append(high[0], jnp.where(small, 0.2, 0.3)))
    ahead = jnp.where(task == PUSH, 0.2, jnp.where(task == PULL, -0.2, 0.0))
    goal_slide = jnp.append(spot[wanted] + jnp.stack([ahead, 0.0]), 0.0)
    goal = jnp.where(task == PICK, goal_pick + jnp.array([0, 0, 1.0]) * side, goal_slide) * cubes
    bin_at = jnp.append(spot[1], 0.0) * (task == PLACE)

    arm = arm_of(robot)
    tint = jax.random.permutation(colours, jnp.asarray(PALETTE))[:BODIES]
    setting = Setting(
        arm=arm,
        base=jnp.stack([jnp.asarray(BASE_X)[robot], jnp.float32(0), jnp.float32(0)]),
        task=task,
        kind=kind,
        half=half,
        colour=tint,
        wanted=wanted.astype(jnp.int32),
        goal=goal,
        goal_seen=(task == PICK) | (cubes & ~jnp.asarray(other)),
        bin=bin_at,
        has_bin=task == PLACE,
    )
    real = jnp.any(arm.axes != 0, axis=-1)
    joints = arm.ready + real * arm.noise * jax.random.normal(noise, arm.ready.shape)
    position = jnp.concatenate([spot, half[:, 2:]], axis=-1)
    state = State(
        joints=jnp.clip(joints, arm.lower, arm.upper),
        opening=jnp.float32(1),
        position=jnp.where(kind[:, None] == NOTHING, 0.0, position),
        rotation=jnp.moveaxis(turned(yaw), -1, 0),
        falling=jnp.zeros(BODIES),
        speed=jnp.zeros(BODIES),
        held=jnp.int32(-1),
        grip_position=jnp.zeros(3),
        grip_rotation=jnp.eye(3),
        moving=jnp.float32(0),
        steps=jnp.int32(0),
    )
    return setting, state


def _box(task: jax.Array, small: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The corners [2, 2] of the boxes that both middles are drawn from."""
    low, high = WIDOWX_PICK
    return jnp.where(small, low, jnp.asarray(BOXES_LOW)[task]), jnp.where(small, high, jnp.asarray(BOXES_HIGH)[task])


def _places(key: jax.Array, task: jax.Array, small: jax.Array, two: jax.Array) -> jax.Array:
    """Middles [2, 2] of both bodies, or of the ball and the bin: the first of many pairs that are far enough apart."""
    low, high = _box(task, small)
    pairs_key, shift_key = jax.random.split(key)
    pairs = jax.random.uniform(pairs_key, (TRIES, BODIES, 2), minval=low, maxval=high)
    pairs = jnp.where(task == STACK, pairs.at[:, 0].set(pairs[0, 0]), pairs)  # there only the second one is tried again
    apart = jnp.abs(pairs[:, 0] - pairs[:, 1])
    distance = jnp.where((task == PUSH) | (task == PULL), apart[:, 1], jnp.sqrt(jnp.sum(apart**2, axis=-1)))
    needed = jnp.where(
        task == STACK, APART_STACKED, jnp.where(task == PICK, jnp.where(small, APART_PICKED[1], APART_PICKED[0]), APART_PUSHED)
    )
    fits = (distance > needed) | ~two
    pair = pairs[jnp.argmax(jnp.where(jnp.any(fits), fits, distance))]
    shift = jax.random.uniform(shift_key, (2,), minval=-0.1, maxval=0.1)  # of both cubes together
    return pair + jnp.where(task == STACK, shift, 0.0)


def succeeded(setting: Setting, state: State) -> jax.Array:
    """Whether the task's rule holds now."""
    at = state.position[setting.wanted]
    away = at - setting.goal
    flat = jnp.sqrt(jnp.sum(away[:2] ** 2))
    small = setting.half[0, 0] < CUBE
    free = (state.held != setting.wanted) & (state.falling[setting.wanted] == 0) & (state.speed[setting.wanted] <= BODY_STILL)

    picked = (jnp.sqrt(jnp.sum(away**2)) <= jnp.where(small, SMALL_PICKED, PICKED)) & (state.moving <= STILL)
    pushed = (flat < REACHED) & (at[2] < CUBE + 0.005)
    pulled = flat < REACHED
    above = state.position[0] - state.position[1]
    stacked = (jnp.sqrt(jnp.sum(above[:2] ** 2)) <= 2**0.5 * CUBE + 0.005) & (jnp.abs(above[2] - 2 * CUBE) <= 0.005) & free
    in_bin = at - setting.bin - jnp.array([0, 0, BALL_IN_BIN])
    placed = (jnp.sqrt(jnp.sum(in_bin[:2] ** 2)) <= 0.005) & (jnp.abs(in_bin[2]) <= 0.005) & free
    long_axis = state.rotation[0, :, 0]
    tilt = jnp.arctan2(jnp.sqrt(jnp.sum(long_axis[:2] ** 2)), jnp.abs(long_axis[2]))
    lifted = (tilt < 0.08) & (jnp.abs(at[2] - PEG[0]) < 0.005)
    return jnp.stack([picked, pushed, pulled, stacked, placed, lifted])[setting.task]


def asked(setting: Setting) -> jax.Array:
    """What an instruction says [3] int32: the task, the colours of the wanted body and of the other one."""
    far = jnp.sum((setting.colour[:, None] - jnp.asarray(PALETTE)) ** 2, axis=-1)  # [BODIES, colours]
    colours = jnp.argmin(far, axis=-1)
    return jnp.stack([setting.task, colours[setting.wanted], colours[1 - setting.wanted]]).astype(jnp.int32)


WORDINGS = (
    (
        "pick up the {0} cube and bring it to the goal",
        "grasp the {0} cube and hold it at the goal",
        "move the {0} cube to the marked point",
    ),
    ("push the {0} cube forward", "push the {0} cube away from the robot", "slide the {0} cube forward to the target"),
    ("pull the {0} cube back", "pull the {0} cube towards the robot", "drag the {0} cube back to the target"),
    ("stack the {0} cube on the {1} cube", "put the {0} cube on top of the {1} cube", "place the {0} cube on the {1} one and let go"),
    ("place the {0} ball in the bin", "put the {0} ball into the bin", "drop the {0} ball in the bin"),
    ("stand the {0} peg upright", "lift the {0} peg so that it stands on its end", "set the {0} peg up on its end"),
)


def instruction(task: int, colour: int, other: int, wording: int = 0) -> str:
    """The words for what `asked` gave; each task has three wordings."""
    return WORDINGS[task][wording % len(WORDINGS[task])].format(COLOURS[colour], COLOURS[other])
