"""Four arms by their true kinematics, as rows of one table.

Where the numbers are from. Links, axes, limits and speeds: the robots' descriptions (URDF) as ManiSkill 3 uses them,
franka_description (panda_v2), xarm_description (xarm6_robotiq; xarm7, on whose link7 the gripper stands as on the other's link6) and
trossen_arm_description (wxai_base). Ready poses: ManiSkill's keyframes; the xArm 7, which it lacks with this gripper, stands like the
xArm 6, whose joint 3 turns the other way. Grippers: the same descriptions and their meshes' bounds, in millimetres,

              stroke            a finger (broad, thick, long)    what holds the fingers
    Panda     2 x 40            18, 15, 54                       hand, 63 x 204 x 92
    2F-85     85                22, 6 (the pad), 60              base, 75 x 85 x 90
    WidowX    2 x 44            18, 8, 70                        link 6, 57 x 180 x 80

A tool lies between the fingers' tips. So does ManiSkill's, but for Panda's, which is 9.5 mm further back. The tips of a 2F-85 swing out
by 14 mm as it closes, which is left out: they stay where they are when it is open.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.evaluate.world.scene import JOINTS, Arm

ROBOTS = ("panda", "xarm6", "xarm7", "widowxai")

PANDA_TIP = 0.0095  # from ManiSkill's tool to the tips

Place = tuple[tuple[float, float, float], tuple[float, float, float]]  # roll, pitch, yaw; x, y, z
QUARTER = np.pi / 2
XARM_QUARTER = 1.5708  # as the xArms' descriptions round it


def _placed(place: Place) -> np.ndarray:
    """The matrix of a description's origin: turned about the fixed x, then y, then z."""
    angles, at = place
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_z @ about_y @ about_x
    matrix[:3, 3] = at
    return matrix


def _arm(links: list[Place], axes: list[tuple[int, int, int]], tool: np.ndarray, **numbers: Any) -> dict[str, np.ndarray]:
    """An arm's row of the table; joints that it lacks are fixed ones at its end."""
    absent = JOINTS - len(links)
    row = {name: np.asarray(value, np.float32) for name, value in numbers.items()}
    per_joint = {name: np.pad(row[name], (0, absent)) for name in ("lower", "upper", "speed", "ready")}
    return {
        **row,
        **per_joint,
        "links": np.stack([_placed(link) for link in links] + [np.eye(4)] * absent).astype(np.float32),
        "axes": np.asarray(axes + [(0, 0, 0)] * absent, np.float32),
        "tool": tool.astype(np.float32),
    }


Z = (0, 0, 1)
PANDA = _arm(
    links=[
        ((0, 0, 0), (0, 0, 0.333)),
        ((-QUARTER, 0, 0), (0, 0, 0)),
        ((QUARTER, 0, 0), (0, -0.316, 0)),
        ((QUARTER, 0, 0), (0.0825, 0, 0)),
        ((-QUARTER, 0, 0), (-0.0825, 0.384, 0)),
        ((QUARTER, 0, 0), (0, 0, 0)),
        ((QUARTER, 0, 0), (0.088, 0, 0)),
    ],
    axes=[Z] * 7,
    tool=_placed(((0, 0, -np.pi / 4), (0, 0, 0.107 + 0.1034 + PANDA_TIP))),
    lower=[-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973],
    upper=[2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973],
    speed=[2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61],
    ready=[0, np.pi / 8, 0, -np.pi * 5 / 8, 0, np.pi * 3 / 4, np.pi / 4],
    noise=0.02,
    stroke=0.08,
    closing=0.2 / 0.04,
    pad=[0.009, 0.0076, 0.027],
    palm=[0.0316, 0.102, 0.046],
    girth=[0.06, 0.06, 0.06, 0.06, 0.055, 0.055, 0.045],
    colour=[0.93, 0.93, 0.90],
)

XARM_FIRST: list[Place] = [((0, 0, 0), (0, 0, 0.267)), ((-XARM_QUARTER, 0, 0), (0, 0, 0))]
XARM_WRIST: Place = ((-XARM_QUARTER, 0, 0), (0.076, 0.097, 0))
ROBOTIQ = {
    "tool": _placed(((0, 0, 0), (0, 0, 0.15))),
    "noise": 0.02,
    "stroke": 0.085,
    "closing": 2 / 0.81,
    "pad": [0.011, 0.003175, 0.03],
    "palm": [0.0375, 0.0424, 0.045],
}
XARM6 = _arm(
    links=[
        *XARM_FIRST,
        ((0, 0, 0), (0.0535, -0.2845, 0)),
        ((-XARM_QUARTER, 0, 0), (0.0775, 0.3425, 0)),
        ((XARM_QUARTER, 0, 0), (0, 0, 0)),
        XARM_WRIST,
    ],
    axes=[Z] * 6,
    lower=[-6.28318530718, -2.059, -3.8, -6.28318530718, -1.69297, -6.28318530718],
    upper=[6.28318530718, 2.0944, 0.19198, 6.28318530718, 3.14159265359, 6.28318530718],
    speed=[3.14] * 6,
    ready=[0, 0.22, -1.23, 0, 1.01, 0],
    girth=[0.055, 0.055, 0.05, 0.045, 0.045, 0.038, 0.038],
    colour=[0.62, 0.76, 0.90],
    **ROBOTIQ,
)
XARM7 = _arm(
    links=[
        *XARM_FIRST,
        ((XARM_QUARTER, 0, 0), (0, -0.293, 0)),
        ((XARM_QUARTER, 0, 0), (0.0525, 0, 0)),
        ((XARM_QUARTER, 0, 0), (0.0775, -0.3425, 0)),
        ((XARM_QUARTER, 0, 0), (0, 0, 0)),
        XARM_WRIST,
    ],
    axes=[Z] * 7,
    lower=[-6.28318530718, -2.059, -6.28318530718, -0.19198, -6.28318530718, -1.69297, -6.28318530718],
    upper=[6.28318530718, 2.0944, 6.28318530718, 3.927, 6.28318530718, 3.14159265359, 6.28318530718],
    speed=[3.14] * 7,
    ready=[0, 0.22, 0, 1.23, 0, 1.01, 0],
    girth=[0.055, 0.055, 0.05, 0.05, 0.045, 0.045, 0.038],
    colour=[0.28, 0.37, 0.52],
    **ROBOTIQ,
)

WIDOWX = _arm(
    links=[
        ((0, 0, 0), (0, 0, 0.05725)),
        ((0, 0, 0), (0.02, 0, 0.04625)),
        ((0, 0, 0), (-0.264, 0, 0)),
        ((0, 0, 0), (0.245, 0, 0.06)),
        ((0, 0, 0), (0.06775, 0, 0.0455)),
        ((0, 0, 0), (0.02895, 0, -0.0455)),
    ],
    axes=[Z, (0, 1, 0), (0, -1, 0), (0, -1, 0), (0, 0, -1), (1, 0, 0)],
    tool=_placed(((np.pi, -QUARTER, 0), (0.156062, 0, 0))),  # its hand looks along x
    lower=[-3.0543261909900767, 0, 0, -1.5707963267948966, -1.5707963267948966, -3.141592653589793],
    upper=[3.0543261909900767, 3.141592653589793, 2.356194490192345, 1.5707963267948966, 1.5707963267948966, 3.141592653589793],
    speed=[3.375, 3.375, 3.375, 7, 7, 7],
    ready=[0, 1.38, 1.04, -1.26, 0, 0],
    noise=0,
    stroke=0.088,
    closing=0.0875 / 0.044,
    pad=[0.009, 0.004, 0.035],
    palm=[0.0285, 0.09, 0.04],
    girth=[0.035, 0.035, 0.03, 0.03, 0.03, 0.028, 0.028],
    colour=[0.15, 0.15, 0.17],
)

_ROWS = (PANDA, XARM6, XARM7, WIDOWX)
TABLE = {name: np.stack([row[name] for row in _ROWS]) for name in Arm._fields}  # columns, their leading axis [robots]


def arm_of(robot: jax.Array | int) -> Arm:
    """A row of the table. The number may be a traced one."""
    return Arm(**{name: jnp.asarray(column)[robot] for name, column in TABLE.items()})


def about(axis: jax.Array, angle: jax.Array) -> jax.Array:
    """The rotation [3, 3] about a unit axis; about none, the identity."""
    x, y, z = axis
    none = jnp.zeros_like(x)
    cross = jnp.stack([jnp.stack([none, -z, y]), jnp.stack([z, none, -x]), jnp.stack([-y, x, none])])
    outer = axis[:, None] * axis[None, :]
    length = jnp.sum(axis * axis)
    return jnp.eye(3) + jnp.sin(angle) * cross + (1 - jnp.cos(angle)) * (outer - length * jnp.eye(3))


def times(left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of small matrices, by elements: batched thousandfold, it becomes one pass where a product of matrices is as many calls."""
    return jnp.sum(left[..., :, :, None] * right[..., None, :, :], axis=-2)


def apply(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """A small matrix times a vector, likewise."""
    return jnp.sum(matrix * vector[..., None, :], axis=-1)


def forward(arm: Arm, base: jax.Array, joints: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the joints' frames [JOINTS, 4, 4] and the tool [4, 4] are in the world."""

    def next_joint(frame: jax.Array, joint: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        link, axis, angle = joint
        frame = times(frame, link)
        frame = frame.at[:3, :3].set(times(frame[:3, :3], about(axis, angle)))
        return frame, frame

    last, frames = jax.lax.scan(next_joint, jnp.eye(4).at[:3, 3].set(base), (arm.links, arm.axes, joints))
    return frames, times(last, arm.tool)


def jacobian(arm: Arm, frames: jax.Array, tool: jax.Array) -> jax.Array:
    """How the tool moves and turns in the world [6, JOINTS] as each joint turns, of what `forward` gave."""
    axes = apply(frames[:, :3, :3], arm.axes)  # [JOINTS, 3]
    return jnp.concatenate([jnp.cross(axes, tool[:3, 3] - frames[:, :3, 3]), axes], axis=-1).T
