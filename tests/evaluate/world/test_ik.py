"""Inverse kinematics over the boxes in which the tasks begin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.evaluate.world.arms import ROBOTS, arm_of, forward
from blm_jax.evaluate.world.ik import pose_error, reach, solve_symmetric

# Where robots stand, and the boxes that their tools must reach looking straight down: low, high.
FIVE = ((-0.1, -0.1, 0.005), (0.1, 0.1, 0.1))
PLACES = {
    "panda": [(-0.615, ((-0.1, -0.1, 0.005), (0.1, 0.1, 0.32)))],
    "xarm6": [(-0.522, ((-0.1, -0.1, 0.005), (0.1, 0.1, 0.32)))],
    "xarm7": [(-0.522, ((-0.1, -0.1, 0.005), (0.1, 0.1, 0.32)))],
    "widowxai": [(-0.3, FIVE), (-0.3, ((0.015, -0.05, 0.005), (0.115, 0.05, 0.1)))],
}
POSES = 500


def _looking_down(box: tuple, rng: np.random.Generator, turned: float = np.pi / 2) -> np.ndarray:
    """Tool poses [POSES, 4, 4] anywhere in a box, turned about the vertical."""
    yaw = rng.uniform(-turned, turned, POSES)
    tools = np.zeros((POSES, 4, 4), np.float32)
    tools[:, 0, 0], tools[:, 0, 1], tools[:, 1, 0], tools[:, 1, 1] = np.cos(yaw), np.sin(yaw), np.sin(yaw), -np.cos(yaw)
    tools[:, 2, 2], tools[:, 3, 3] = -1, 1
    tools[:, :3, 3] = rng.uniform(box[0], box[1], (POSES, 3))
    return tools


@jax.jit
def reach_all(robot: jax.Array, base: jax.Array, wanted: jax.Array, turning: jax.Array) -> tuple[jax.Array, jax.Array]:
    arm = arm_of(robot)
    return jax.vmap(lambda pose: reach(arm, base, pose, arm.ready, arm.ready, 12, turning))(wanted)


@pytest.mark.parametrize("robot", ROBOTS)
def test_poses_of_the_tasks_are_reached_from_the_ready_pose(robot: str) -> None:
    arm, rng = arm_of(ROBOTS.index(robot)), np.random.default_rng(0)
    for base, box in PLACES[robot]:
        wanted = _looking_down(box, rng)
        joints, left = reach_all(ROBOTS.index(robot), jnp.array([base, 0, 0]), wanted, 1.0)
        assert np.mean((left[:, 0] < 1e-4) & (left[:, 1] < np.deg2rad(0.1))) >= 0.995, (robot, base)
        assert np.all((arm.lower <= joints) & (joints <= arm.upper))
        # What it says is left is left.
        _, tools = jax.vmap(lambda row, arm=arm, base=base: forward(arm, jnp.array([base, 0, 0]), row))(joints)
        assert np.allclose(np.linalg.norm(np.asarray(tools)[:, :3, 3] - wanted[:, :3, 3], axis=-1), left[:, 0], atol=1e-6)


def test_out_of_reach_the_place_is_kept_and_the_direction_given_up() -> None:
    wanted = _looking_down(((0.015, -0.05, 0.18), (0.115, 0.05, 0.22)), np.random.default_rng(1), 0.3)
    _, left = reach_all(3, jnp.array([-0.3, 0, 0]), wanted, 0.03)
    assert np.max(left[:, 0]) < 0.002
    assert 0.1 < np.max(left[:, 1]) < 0.4


def test_the_error_of_a_pose_is_the_way_and_the_turn_to_it() -> None:
    axis = np.array([0.6, 0, 0.8])
    for angle in (1e-3, 1.0, 3.0):
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        wanted = np.eye(4, dtype=np.float32)
        wanted[:3, :3] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        wanted[:3, 3] = 1, 2, 3
        assert np.allclose(pose_error(jnp.eye(4), jnp.asarray(wanted)), [1, 2, 3, *(angle * axis)], rtol=1e-4, atol=1e-6)


def test_symmetric_systems_are_solved() -> None:
    rng = np.random.default_rng(2)
    half = rng.normal(size=(7, 7))
    matrix, right = half @ half.T + np.eye(7), rng.normal(size=7)
    assert np.allclose(
        solve_symmetric(jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32)), np.linalg.solve(matrix, right), atol=1e-4
    )
