"""Inverse kinematics: the joints that bring an arm's tool to a pose, by damped least squares.

A fixed number of Newton steps on the pose's error, each within the joints' limits. What the pose leaves free, a seventh joint's worth,
is drawn to a preferred posture, so that the same pose is always reached by the same elbow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blm_jax.evaluate.world.arms import apply, forward, jacobian, times
from blm_jax.evaluate.world.scene import Arm

STEP = 0.6  # radians a joint turns in an iteration, at most
DAMPING = 1e-6  # of the normal equations; vanishing beside errors that are solved
WARY = 1e-2  # more of it, the further away: times the squared error
PULL = 0.5  # of the way to the posture in an iteration, less in later ones
SETTLING = 2  # iterations at the end which the posture does not disturb


def pose_error(tool: jax.Array, wanted: jax.Array) -> jax.Array:
    """How the tool must move and turn [6] to come to the wanted pose, both [4, 4]: metres and, for small turns, radians."""
    turned = times(wanted[:3, :3], tool[:3, :3].T)
    # Half the skew part is the axis times the angle's sine; beyond a right angle it shrinks again, so it is scaled to the angle.
    skew = 0.5 * jnp.stack([turned[2, 1] - turned[1, 2], turned[0, 2] - turned[2, 0], turned[1, 0] - turned[0, 1]])
    sine = jnp.sqrt(jnp.sum(skew**2) + 1e-20)
    angle = jnp.arctan2(sine, 0.5 * (jnp.trace(turned) - 1))
    return jnp.concatenate([wanted[:3, 3] - tool[:3, 3], skew * (angle / sine)])


def solve_symmetric(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """The solution [n] of a positive definite system: elimination without a search for pivots, the same few operations for any batch."""
    size = matrix.shape[0]
    rows = jnp.concatenate([matrix, right[:, None]], axis=1)  # [n, n + 1]

    def clear_column(column: jax.Array, rows: jax.Array) -> jax.Array:
        pivot = rows[column] / rows[column, column]
        cleared = rows - rows[:, column, None] * pivot
        return cleared.at[column].set(pivot)

    return jax.lax.fori_loop(0, size, clear_column, rows)[:, size]


def reach(
    arm: Arm, base: jax.Array, wanted: jax.Array, start: jax.Array, posture: jax.Array, iterations: int, turning: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Joints [JOINTS] that bring the tool to `wanted` [4, 4], searched from `start`, and what error [2] is left: metres and radians.

    `turning` weighs radians beside metres: with a small one, a pose out of reach keeps its place and gives up its direction.
    """
    has_joint = jnp.sum(arm.axes**2, axis=-1)  # [JOINTS]
    weights = jnp.concatenate([jnp.ones(3), jnp.full(3, turning)])

    def change_of(slopes: jax.Array, error: jax.Array, pull: jax.Array, free: jax.Array) -> jax.Array:
        slopes = slopes * free  # a column a joint
        damping = DAMPING + WARY * jnp.sum(error**2)
        normal = times(slopes.T, slopes) + jnp.diag(damping + (1 - free))
        # The pull is freed of what would move the tool: x - (J'J + d)^-1 J'J x; both are one system.
        pull = pull * free
        return pull + solve_symmetric(normal, apply(slopes.T, error - apply(slopes, pull)))

    def improve(i: jax.Array, joints: jax.Array) -> jax.Array:
        frames, tool = forward(arm, base, joints)
        slopes, error = jacobian(arm, frames, tool) * weights[:, None], pose_error(tool, wanted) * weights
        pull = PULL * jnp.maximum(0, 1 - (i + SETTLING) / iterations) * jnp.clip(posture - joints, -STEP, STEP)
        change = change_of(slopes, error, pull, has_joint)
        stuck = ((joints <= arm.lower) & (change < 0)) | ((joints >= arm.upper) & (change > 0))
        change = change_of(slopes, error, pull, jnp.where(stuck, 0, has_joint))
        change = change * jnp.minimum(1.0, STEP / (jnp.max(jnp.abs(change)) + 1e-9))
        return jnp.clip(joints + change, arm.lower, arm.upper)

    joints = jax.lax.fori_loop(0, iterations, improve, start)
    error = pose_error(forward(arm, base, joints)[1], wanted)
    return joints, jnp.stack([jnp.linalg.norm(error[:3]), jnp.linalg.norm(error[3:])])
