"""Kinematics against Pinocchio's numbers (benchmarks/_world_kinematics.py made them), and limits against the robots' own file."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.data.demos.robots import load_robots
from blm_jax.evaluate.world.arms import PANDA_TIP, ROBOTS, TABLE, arm_of, forward, jacobian
from blm_jax.evaluate.world.scene import JOINTS

GOLDEN = Path(__file__).parents[2] / "golden" / "world_kinematics.npz"

# From the frame that Pinocchio was asked for to ours, between the tips: rotation, translation.
FROM_DESCRIPTION = {
    "panda": (np.eye(3), (0, 0, PANDA_TIP)),
    "xarm6": (np.eye(3), (0, 0, 0)),
    "xarm7": (np.eye(3), (0, 0, 0.15)),  # the gripper on link7
    "widowxai": (np.array([[0, 0, 1], [0, -1, 0], [1, 0, 0]]), (0, 0, 0)),  # its x looks out of the hand
}


def _padded(angles: np.ndarray) -> np.ndarray:
    return np.pad(angles, ((0, 0), (0, JOINTS - angles.shape[1])))


forward_of = jax.jit(lambda robot, base, joints: jax.vmap(lambda row: forward(arm_of(robot), base, row))(joints))


@pytest.mark.parametrize("robot", ROBOTS)
def test_frames_and_tool_are_pinocchios(robot: str) -> None:
    golden = np.load(GOLDEN)
    angles = golden[f"{robot}/joints"]
    base = np.array([-0.5, 0.1, 0.02], np.float32)
    frames, tools = forward_of(ROBOTS.index(robot), base, _padded(angles))
    expected = golden[f"{robot}/frames"].copy()
    expected[..., 3] += base
    assert np.max(np.abs(np.asarray(frames)[:, : angles.shape[1], :3] - expected)) < 1e-5
    # Fixed joints at the end stay with the last one that turns.
    assert np.array_equal(
        frames[:, angles.shape[1] :], np.broadcast_to(frames[:, angles.shape[1] - 1 : angles.shape[1]], frames[:, angles.shape[1] :].shape)
    )

    rotation, translation = FROM_DESCRIPTION[robot]
    described = golden[f"{robot}/tool"]
    assert np.max(np.abs(np.asarray(tools)[:, :3, :3] - described[:, :, :3] @ rotation)) < 1e-5
    assert np.max(np.abs(np.asarray(tools)[:, :3, 3] - (described[:, :, 3] + described[:, :, :3] @ np.array(translation) + base))) < 1e-5


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_jacobian_is_the_slope_of_the_tool(robot: str) -> None:
    arm, base = arm_of(ROBOTS.index(robot)), jnp.zeros(3)
    joints = jnp.asarray(_padded(np.load(GOLDEN)[f"{robot}/joints"][:1])[0])
    slopes = jacobian(arm, *forward(arm, base, joints))
    by_jax = jax.jacobian(lambda joints: forward(arm, base, joints)[1])(joints)  # [4, 4, JOINTS]
    rotation = forward(arm, base, joints)[1][:3, :3]
    spins = np.einsum("ijk,lj->ilk", by_jax[:3, :3], rotation)  # skew matrices of the turns
    assert np.allclose(slopes[:3], by_jax[:3, 3], atol=1e-5)
    assert np.allclose(slopes[3:], np.stack([spins[2, 1], spins[0, 2], spins[1, 0]]), atol=1e-5)


def test_limits_are_those_of_the_robots_file() -> None:
    robots = load_robots()
    for index, robot in enumerate(ROBOTS):
        joints = [dimension for dimension in robots[robot].state if dimension.kind == "joint"]
        low, high = ([getattr(joint, end) for joint in joints] + [0] * (JOINTS - len(joints)) for end in ("low", "high"))
        assert np.array_equal(TABLE["lower"][index], np.array(low, np.float32)), robot
        assert np.array_equal(TABLE["upper"][index], np.array(high, np.float32)), robot
        turning = np.arange(JOINTS) < len(joints)
        assert np.array_equal(np.any(TABLE["axes"][index] != 0, axis=-1), turning)
        assert np.array_equal(TABLE["speed"][index] > 0, turning)


@pytest.mark.parametrize("robot", ROBOTS)
def test_ready_means_open_above_the_table_and_looking_down(robot: str) -> None:
    arm = arm_of(ROBOTS.index(robot))
    _, tool = forward(arm, jnp.zeros(3), arm.ready)
    assert np.all((arm.lower <= arm.ready) & (arm.ready <= arm.upper))
    assert np.allclose(tool[:3, 2], (0, 0, -1), atol=0.03)
    assert np.allclose(tool[:3, 0], (1, 0, 0), atol=0.03)
    assert 0.08 < tool[2, 3] < 0.2
