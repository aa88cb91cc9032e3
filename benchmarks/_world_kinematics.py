"""Where Pinocchio puts the robots' joints and tools: the golden numbers that tests/evaluate/world/test_arms.py compares with.

Wants an environment with NumPy and `pin` (`pip install pin`), and the robots' descriptions as ManiSkill 3 has them:

    python benchmarks/_world_kinematics.py --panda panda_v2.urdf --xarm6 xarm6_robotiq.urdf --xarm7 xarm7.urdf \\
        --widowxai wxai_base.urdf --out tests/golden/world_kinematics.npz
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np
import pinocchio  # pyright: ignore[reportMissingImports]

DRAWS = 100

# A robot's joints, and the link that its tool is fixed to (xarm7.urdf ends where the gripper begins).
ROBOTS = {
    "panda": ([f"panda_joint{i}" for i in range(1, 8)], "panda_hand_tcp"),
    "xarm6": ([f"joint{i}" for i in range(1, 7)], "eef"),
    "xarm7": ([f"joint{i}" for i in range(1, 8)], "link7"),
    "widowxai": ([f"joint_{i}" for i in range(6)], "ee_gripper_link"),
}


def poses(path: str, joints: list[str], tool: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joint angles [draws, joints] between their limits, the joints' frames [draws, joints, 4, 4] and the tool's [draws, 4, 4]."""
    model = pinocchio.buildModelFromUrdf(path)
    data = model.createData()
    numbers = [model.getJointId(name) for name in joints]
    places = [model.joints[number].idx_q for number in numbers]
    angles = rng.uniform(model.lowerPositionLimit[places], model.upperPositionLimit[places], (DRAWS, len(joints))).astype(np.float32)
    frames, tools = [], []
    for row in angles:
        whole = pinocchio.neutral(model)
        whole[places] = row
        pinocchio.framesForwardKinematics(model, data, whole)
        frames.append([data.oMi[number].homogeneous for number in numbers])
        tools.append(data.oMf[model.getFrameId(tool)].homogeneous)
    return angles, np.array(frames), np.array(tools)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for robot in ROBOTS:
        parser.add_argument(f"--{robot}", required=True, metavar="URDF")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for robot, (joints, tool) in ROBOTS.items():
        angles, frames, tools = poses(getattr(options, robot), joints, tool, rng)
        found |= {f"{robot}/joints": angles, f"{robot}/frames": frames[:, :, :3], f"{robot}/tool": tools[:, :3]}
    np.savez_compressed(options.out, allow_pickle=False, **{name: values.astype(np.float32) for name, values in found.items()})
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, pin {pinocchio.__version__}: {options.out}")


if __name__ == "__main__":
    main()
