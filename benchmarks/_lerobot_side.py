"""What lerobot reads of a set: `python _lerobot_side.py SET OUT HORIZON`, by an interpreter that has it and nothing of this project."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index")


def main(path: str, out: str, horizon: int) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]

    plain = LeRobotDataset("blm/ours", root=path)
    chunked = LeRobotDataset("blm/ours", root=path, delta_timestamps={"action": [i / plain.fps for i in range(horizon)]})
    rows = [plain[i] for i in range(len(plain))]
    arrays: dict[str, Any] = {name: np.stack([row[name].numpy() for row in rows]) for name in NUMBERS}
    for camera in plain.meta.camera_keys:  # lerobot gives floats of 0 to 1, channels first
        frames = np.stack([row[camera].numpy() for row in rows])
        arrays[camera] = np.round(255 * frames).astype(np.uint8).transpose(0, 2, 3, 1)
    chunks = [chunked[i] for i in range(len(chunked))]
    arrays |= {
        "chunk": np.stack([row["action"].numpy() for row in chunks]),
        "padding": np.stack([row["action_is_pad"].numpy() for row in chunks]),
    }
    for key, summary in plain.meta.stats.items():
        arrays |= {f"stats/{key}/{name}": np.asarray(value) for name, value in summary.items()}
    episodes = plain.meta.episodes
    for name in ("length", "dataset_from_index", "dataset_to_index"):
        arrays[f"episodes/{name}"] = np.array(episodes[name])
    np.savez(f"{out}.npz", task=np.array([row["task"] for row in rows]), **arrays)
    versions = {name: importlib.metadata.version(name) for name in ("lerobot", "torch", "torchcodec", "datasets", "numpy")}
    told = {"fps": plain.fps, "robot_type": plain.meta.robot_type, "cameras": plain.meta.camera_keys, "versions": versions}
    told["names"] = {key: plain.meta.features[key]["names"] for key in ("observation.state", "action")}
    Path(f"{out}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
