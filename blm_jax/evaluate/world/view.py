"""What an episode looks like: its shapes, and the two cameras that see them.

Both cameras look closely: at a field of view of 90 degrees a cube is four pixels wide, too few to say where it is. The first looks at the
robot from across the table and tells height and y; the second, from the robot's right, height and x. Both look from low down, because a
hand that comes from above covers a cube from above. All that the tasks lay out is in both, but for the outermost of StackCube's, which the
first cuts off. A goal in the air is a sign and no body: ManiSkill tells it as a number, so nothing may hide it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.evaluate.world import arms, render
from blm_jax.evaluate.world.contact import BIN_CENTRES, BIN_HALVES
from blm_jax.evaluate.world.render import Camera
from blm_jax.evaluate.world.scene import BALL, BODIES, BOX, JOINTS, Arm, Setting, Shapes, State
from blm_jax.evaluate.world.tasks import REACHED

SIZE = 112  # pixels, of either side
UP, FIELD = np.array([0, 0, 1], np.float32), np.float32(np.radians(30))
CAMERAS = {
    "front": Camera(np.array([1.16, 0, 0.56], np.float32), np.array([0, 0, 0.098], np.float32), UP, FIELD),
    "side": Camera(np.array([-0.01, -1.16, 0.56], np.float32), np.array([-0.01, 0, 0.098], np.float32), UP, FIELD),
}

HAND_COLOUR = (0.25, 0.25, 0.28)
PAD_COLOUR = (0.1, 0.1, 0.12)
BIN_COLOUR = (0.45, 0.33, 0.22)
GOAL_COLOUR = (0.6, 1.0, 0.15)  # of no body
TARGET_COLOUR = (0.95, 0.95, 0.95)
GOAL_RADIUS = 0.015  # a cube is seen around it
TARGET_HALF = 0.001  # of the height of a target, which is as wide as its task allows
PEDESTAL = (1.5, 0.02)  # radii of the first link, and half its height


def shapes(setting: Setting, state: State) -> Shapes:
    bodies = body_shapes(setting.kind, setting.half, state.position, state.rotation, setting.colour)
    return joined(arm_shapes(setting.arm, setting.base, state.joints, state.opening), bodies, place_shapes(setting))


def pictures(scenes: Shapes, size: int = SIZE) -> jax.Array:
    """What all cameras see of a batch of scenes, [batch, cameras, size, size, 3] uint8. One program is compiled for all cameras."""
    every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *CAMERAS.values())
    return jnp.swapaxes(jax.lax.map(lambda camera: render.pictures(scenes, camera, size), every), 0, 1)


def joined(*parts: Shapes) -> Shapes:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def arm_shapes(arm: Arm, base: jax.Array, joints: jax.Array, opening: jax.Array) -> Shapes:
    """Three boxes, a rod from joint to joint and one to the hand, and a foot."""
    frames, tool = arms.forward(arm, base, joints)
    hand = hand_shapes(tool, jnp.stack([arm.palm, arm.pad]), opening * arm.stroke, jnp.asarray(HAND_COLOUR), jnp.asarray(PAD_COLOUR))
    places = jnp.concatenate([base[None], frames[:, :3, 3], hand.box_centre[:1]])  # [JOINTS + 2, 3]
    foot_wide, foot_high = PEDESTAL
    links = _only(
        rod_start=places[:-1],
        rod_end=places[1:],
        rod_radius=jnp.concatenate([arm.girth, arm.girth[-1:]]),
        rod_colour=jnp.broadcast_to(arm.colour, (JOINTS + 1, 3)),
        drum_centre=(base + jnp.array([0, 0, foot_high]))[None],
        drum_radius=foot_wide * arm.girth[:1],
        drum_half=jnp.full(1, foot_high),
        drum_colour=arm.colour[None],
    )
    return joined(hand, links)


def hand_shapes(tool: jax.Array, half: jax.Array, apart: jax.Array, palm: jax.Array, pad: jax.Array) -> Shapes:
    """A palm and two pads whose inner sides are so far apart; half sizes [2, 3] of both kinds, and their colours."""
    palm_half, pad_half = half
    turned = tool[:3, :3]
    pad_y = apart / 2 + pad_half[1]
    behind = -2 * pad_half[2] - palm_half[2]
    in_hand = jnp.stack([jnp.stack([0 * pad_y, y, z]) for y, z in ((0 * pad_y, behind), (-pad_y, -pad_half[2]), (pad_y, -pad_half[2]))])
    return _only(
        box_centre=tool[:3, 3] + in_hand @ turned.T,
        box_rotation=jnp.broadcast_to(turned, (3, 3, 3)),
        box_half=jnp.stack([palm_half, pad_half, pad_half]),
        box_colour=jnp.stack([palm, pad, pad]),
    )


def body_shapes(kind: jax.Array, half: jax.Array, position: jax.Array, rotation: jax.Array, colour: jax.Array) -> Shapes:
    """A box and a ball for each body, one of which has no size."""
    return _only(
        box_centre=position,
        box_rotation=rotation,
        box_half=jnp.where((kind == BOX)[:, None], half, 0),
        box_colour=colour,
        ball_centre=position,
        ball_radius=jnp.where(kind == BALL, half[:, 0], 0),
        ball_colour=colour,
    )


def bar_shapes(ends: jax.Array, girth: jax.Array, colour: jax.Array) -> Shapes:
    """Rods that hang one on the other."""
    return _only(rod_start=ends[:-1], rod_end=ends[1:], rod_radius=girth, rod_colour=jnp.broadcast_to(colour, (len(girth), 3)))


def place_shapes(setting: Setting) -> Shapes:
    """Bin and goal: a sign in the air, or a disc on the table where a body is to be pushed."""
    in_air = setting.goal_seen & (setting.goal[2] > 0)
    on_table = setting.goal_seen & (setting.goal[2] <= 0)
    walls = len(BIN_HALVES)
    flat = setting.goal * jnp.array([1, 1, 0])
    return _only(
        box_centre=setting.bin + jnp.asarray(BIN_CENTRES),
        box_rotation=jnp.broadcast_to(jnp.eye(3), (walls, 3, 3)),
        box_half=jnp.asarray(BIN_HALVES) * setting.has_bin,
        box_colour=jnp.broadcast_to(jnp.asarray(BIN_COLOUR), (walls, 3)),
        sign_centre=setting.goal[None],
        sign_radius=(GOAL_RADIUS * in_air)[None],
        sign_colour=jnp.asarray([GOAL_COLOUR]),
        drum_centre=jnp.stack([flat + jnp.array([0, 0, high * TARGET_HALF]) for high in (1, 3)]),
        drum_radius=jnp.array([REACHED, REACHED / 4]) * on_table,
        drum_half=jnp.full(2, TARGET_HALF),
        drum_colour=jnp.asarray([TARGET_COLOUR, GOAL_COLOUR]),
    )


def _only(**given: jax.Array) -> Shapes:
    """These shapes and none of other kinds."""
    kinds = {"box": {"centre": (3,), "rotation": (3, 3), "half": (3,)}, "ball": {"centre": (3,), "radius": ()}}
    kinds |= {"rod": {"start": (3,), "end": (3,), "radius": ()}, "drum": {"centre": (3,), "radius": (), "half": ()}}
    kinds["sign"] = kinds["ball"]
    empty = {f"{kind}_{name}": jnp.zeros((0, *form)) for kind, names in kinds.items() for name, form in {**names, "colour": (3,)}.items()}
    return Shapes(**{**empty, **given})


def numbers(one: Shapes) -> dict[str, tuple[int, ...]]:
    """Which shapes of an episode each body is, and the goal, by the numbers that `render.first_seen` gives."""
    balls = len(one.box_half)
    drums = balls + len(one.ball_radius) + len(one.rod_radius)
    signs = drums + len(one.drum_radius)
    hand = 3  # boxes that come before the bodies', as the foot comes before the target
    bodies = {f"body {i}": (hand + i, balls + i) for i in range(BODIES)}
    return bodies | {"goal": (drums + 1, drums + 2, signs)}


def tiled(rows: Sequence[Sequence[np.ndarray]] | np.ndarray, gap: int = 2) -> np.ndarray:
    """Pictures of one size as one, with white between them."""
    height, width, _ = rows[0][0].shape
    sheet = np.full((len(rows) * (height + gap) - gap, max(map(len, rows)) * (width + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = one
    return sheet
