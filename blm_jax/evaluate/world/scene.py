"""What the embedded world is made of, as arrays of one episode: `jax.vmap` makes thousands of them, a mesh divides those.

All arms and all tasks have the same shapes, so one compiled program runs every cell. Metres, radians, seconds; the table's top is
z = 0, and a robot stands on it at a negative x, looking along x.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

JOINTS = 7  # an arm of fewer has fixed ones at its end
BODIES = 2  # that move, at most
HZ = 20.0  # of control
SUBSTEPS = 5  # of physics, in each of its steps
DT = 1 / HZ / SUBSTEPS

NOTHING, BOX, BALL = 0, 1, 2  # kinds of a body


class Arm(NamedTuple):
    """One arm and its gripper. Joint i turns about `axes[i]` of the frame that `links[i]` puts behind the frame of joint i - 1."""

    links: jax.Array  # [JOINTS, 4, 4] at rest
    axes: jax.Array  # [JOINTS, 3], zero where a joint is fixed
    tool: jax.Array  # [4, 4] from the last joint to the point between the pads' tips; its z looks out of the hand, its y from pad to pad
    lower: jax.Array  # [JOINTS]
    upper: jax.Array  # [JOINTS]
    speed: jax.Array  # [JOINTS] at most, a second
    ready: jax.Array  # [JOINTS] where an episode begins, but for its noise
    noise: jax.Array  # [] of that beginning
    stroke: jax.Array  # [] between the pads when they are open
    closing: jax.Array  # [] openings a second
    pad: jax.Array  # [3] half sizes of a pad along the tool's axes; its tip lies at z = 0 of the tool
    palm: jax.Array  # [3] half sizes of what the pads are fixed to
    girth: jax.Array  # [JOINTS] radii of the links, for pictures
    colour: jax.Array  # [3] of the links, 0 to 1


class Setting(NamedTuple):
    """What stays as it is through an episode."""

    arm: Arm
    base: jax.Array  # [3] where the arm stands
    task: jax.Array  # [] int32, of tasks.TASKS
    kind: jax.Array  # [BODIES] int32
    half: jax.Array  # [BODIES, 3] half sizes; of a ball its radius, thrice
    colour: jax.Array  # [BODIES, 3] 0 to 1
    wanted: jax.Array  # [] int32, the body that the instruction means
    goal: jax.Array  # [3] of that body, where the task has one
    goal_seen: jax.Array  # [] bool
    bin: jax.Array  # [3] the bin's middle, on the table
    has_bin: jax.Array  # [] bool


class State(NamedTuple):
    """What a step changes."""

    joints: jax.Array  # [JOINTS]
    opening: jax.Array  # [] 0 closed, 1 open
    position: jax.Array  # [BODIES, 3]
    rotation: jax.Array  # [BODIES, 3, 3]
    falling: jax.Array  # [BODIES] downward, metres a second
    speed: jax.Array  # [BODIES] of their middles in the last step, metres a second
    held: jax.Array  # [] int32, the body between the pads, or -1
    grip_position: jax.Array  # [3] of that body, in the tool's frame
    grip_rotation: jax.Array  # [3, 3]
    moving: jax.Array  # [] the fastest joint in the last step, radians a second
    steps: jax.Array  # [] int32


class Shapes(NamedTuple):
    """What a picture shows of a scene. A shape of no size is not seen."""

    box_centre: jax.Array  # [boxes, 3]
    box_rotation: jax.Array  # [boxes, 3, 3], columns are the box's axes
    box_half: jax.Array  # [boxes, 3]
    box_colour: jax.Array  # [boxes, 3] 0 to 1
    ball_centre: jax.Array  # [balls, 3]
    ball_radius: jax.Array  # [balls]
    ball_colour: jax.Array  # [balls, 3]
    rod_start: jax.Array  # [rods, 3] capsules
    rod_end: jax.Array  # [rods, 3]
    rod_radius: jax.Array  # [rods]
    rod_colour: jax.Array  # [rods, 3]
    drum_centre: jax.Array  # [drums, 3] upright cylinders
    drum_radius: jax.Array  # [drums]
    drum_half: jax.Array  # [drums] height
    drum_colour: jax.Array  # [drums, 3]
    sign_centre: jax.Array  # [signs, 3] balls of light, which are not there: nothing hides or shades them, and they cast no shadow
    sign_radius: jax.Array  # [signs]
    sign_colour: jax.Array  # [signs, 3]
