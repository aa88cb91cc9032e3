"""Sets that our recorder writes, loaded by lerobot itself: frames, numbers, times, tasks, statistics and the ends of episodes.

    blm bench lerobot_reads_ours --python PATH [--save]

PATH is the interpreter of an environment with lerobot, which need not be this one: its requirements clash with ours.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Result, progress, run_as_script, save

from blm_jax.data.demos import lerobot_writer
from blm_jax.data.demos.demonstrations import Demonstrations, open_demonstrations
from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.recorder import Recorder
from blm_jax.data.demos.robots import IMAGES, Camera, Dimension, Robot
from blm_jax.data.demos.survey import Survey, survey
from blm_jax.errors import RequestError, RunError

NAME = "lerobot_reads_ours"
SIDE = Path(__file__).with_name("_lerobot_side.py")
JOINTS = (*(Dimension(f"joint{i}", "rad", -3, 3) for i in range(1, 7)), Dimension("gripper", "opening", 0, 1, "gripper"))
ROBOT = Robot("my_arm", JOINTS, JOINTS, (Camera("front", 96, 128), Camera("wrist", 64, 64)), hz=20, horizon=16, executed=8)
LENGTHS = (40, 5, 31, 24, 1, 60)  # of episodes; some are shorter than a chunk
PER_FILE = 64  # frames, after which the writer begins another file: this set has two
TASKS = ("put the cup away", "open the drawer", "gib mir den Würfel 🧊")
LOST = 3.0  # levels of 255, on average: what the video's compression may take from smooth pictures


def recordings() -> list[Recording]:
    """Smooth pictures with a square that tells the step; numbers at random."""
    random = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        state, action = (random.uniform(-1, 1, (length, len(JOINTS))).astype(np.float32) for _ in range(2))
        images = {camera.name: _pictures(camera, length, number) for camera in ROBOT.cameras}
        made.append(Recording(TASKS[number % len(TASKS)], state, action, images))
    return made


def _pictures(camera: Camera, length: int, episode: int) -> np.ndarray:
    shade = np.linspace(40, 120, camera.width)[None, :, None] + np.array([0, 20, 40]) + 10 * episode
    frames = np.broadcast_to(shade, (length, camera.height, camera.width, 3)).astype(np.uint8).copy()
    for step in range(length):
        row, column = (8 * place for place in divmod(step, 8))
        frames[step, row : row + 8, column : column + 8] = 230
    return frames


def main(argv: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog=f"blm bench {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="an interpreter that can import lerobot")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as folder:
        result = compared(Path(folder), args.python)
    print("\n".join(f"{name:<24}{what}" for name, what in result["compared"].items()))
    if args.save:
        save(NAME, result)
    return result


def compared(folder: Path, python: str) -> Result:
    lerobot_writer.FRAMES = PER_FILE
    written = recordings()
    progress("our recorder writes a set")
    with Recorder(folder / "set", ROBOT, "lerobot") as recorder:
        for one in written:
            recorder.add(one)
    progress("lerobot reads it")
    theirs, told = read_by_lerobot(python, folder / "set", folder / "theirs")
    found = survey([folder / "set"], ROBOT)
    ours = open_demonstrations(folder / "set", ROBOT, found)
    agreed = {
        **check_numbers(written, theirs, told),
        **check_borders(written, theirs, ours),
        **check_frames(written, theirs, ours),
        **check_statistics(written, theirs, found),
    }
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"blm-jax": importlib.metadata.version("blm-jax"), **told["versions"]},
        "set": {
            "episodes": len(LENGTHS),
            "frames": sum(LENGTHS),
            "files": len(list((folder / "set/data").rglob("*.parquet"))),
            "fps": ROBOT.hz,
        },
        "compared": agreed,
    }


def read_by_lerobot(python: str, path: Path, out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent / "cache"), "PYTHONPATH": ""}
    try:
        done = subprocess.run([python, str(SIDE), str(path), str(out), str(ROBOT.horizon)], env=environment, capture_output=True, text=True)
    except OSError as error:
        raise RequestError(f"--python {python} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        if "No module named 'lerobot" in said:
            raise RequestError(f"--python {python} has no lerobot: name an interpreter that can import it")
        raise RunError(f"lerobot cannot read what our recorder wrote: {said}")
    with np.load(f"{out}.npz") as arrays:
        return dict(arrays), json.loads(Path(f"{out}.json").read_text())


# --- what is compared --------------------------------------------------------------------------------------------------------


def check(holds: bool, what: str, difference: str) -> None:
    if not holds:
        raise RunError(f"{what}: lerobot reads something else than we do: {difference}")


def check_numbers(written: list[Recording], theirs: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> dict[str, str]:
    """Bit for bit: of each frame, the state, the action, its time and its counters; and what is told of them."""
    steps = np.concatenate([np.arange(length) for length in LENGTHS])
    wanted = {
        "observation.state": np.concatenate([one.state for one in written]),
        "action": np.concatenate([one.action for one in written]),
        "timestamp": (steps / ROBOT.hz).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.repeat(np.arange(len(LENGTHS)), LENGTHS),
        "index": np.arange(len(steps)),
        "task_index": np.repeat(np.arange(len(LENGTHS)) % len(TASKS), LENGTHS),
        "task": np.repeat([one.instruction for one in written], LENGTHS),
    }
    for name, values in wanted.items():
        check(np.array_equal(theirs[name], values), name, f"lerobot read {theirs[name][:3]} ..., written was {values[:3]} ...")
    names = [dimension.name for dimension in JOINTS]
    about = {"fps": ROBOT.hz, "robot_type": ROBOT.name, "cameras": [IMAGES + camera.name for camera in ROBOT.cameras]}
    about["names"] = {"observation.state": names, "action": names}
    for name, value in about.items():
        check(told[name] == value, name, f"lerobot read {told[name]}, written was {value}")
    return {"numbers": f"equal: {', '.join(wanted)}", "described": f"equal: {', '.join(about)}"}


def check_borders(written: list[Recording], theirs: Mapping[str, np.ndarray], ours: Demonstrations) -> dict[str, str]:
    """Where episodes begin and end, and chunks of actions there: each lerobot's `action_is_pad` is our mask."""
    ends = np.cumsum(LENGTHS)
    wanted = {"length": np.array(LENGTHS), "dataset_from_index": ends - LENGTHS, "dataset_to_index": ends}
    for name, values in wanted.items():
        check(np.array_equal(theirs[f"episodes/{name}"], values), name, f"{theirs[f'episodes/{name}']}, not {values}")
    windows = [ours.window(i) for i in range(len(ours))]
    check(len(windows) == len(theirs["chunk"]), "windows", f"{len(theirs['chunk'])}, not {len(windows)}")
    masks, chunks = np.stack([one.mask for one in windows]), np.stack([one.actions for one in windows])
    check(np.array_equal(~theirs["padding"], masks), "padding", "chunks end elsewhere")
    check(np.array_equal(theirs["chunk"][masks], chunks[masks]), "chunks", "actions differ")
    return {
        "ends of episodes": f"equal: {len(LENGTHS)} episodes, {len(windows)} chunks of {ROBOT.horizon} steps, {(~masks).sum()} steps padded"
    }


def check_frames(written: list[Recording], theirs: Mapping[str, np.ndarray], ours: Demonstrations) -> dict[str, str]:
    """As our reader decodes them, to a level; and no other step's, which would be farther from what was written than this one."""
    found = {}
    for camera in ROBOT.cameras:
        decoded = theirs[IMAGES + camera.name].astype(np.int16)
        read = [ours.source.frames(number, IMAGES + camera.name, range(length)) for number, length in enumerate(LENGTHS)]
        apart = np.abs(decoded - np.concatenate(read)).max()
        check(bool(apart <= 1), f"frames of {camera.name}", f"up to {apart} levels from those our reader decodes")
        lost = []
        for number, one in enumerate(written):
            own = decoded[sum(LENGTHS[:number]) :][: LENGTHS[number]]
            each = np.abs(own[:, None] - one.images[camera.name][None].astype(np.int16)).mean(axis=(2, 3, 4))  # [read, written]
            check(bool((each.argmin(axis=1) == np.arange(len(own))).all()), f"frames of {camera.name}", "they are those of other steps")
            lost.append(np.diag(each))
        mean = float(np.concatenate(lost).mean())
        check(mean < LOST, f"frames of {camera.name}", f"{mean:.2f} levels from those that were written")
        found[f"frames of {camera.name}"] = f"within {apart} of 255 levels of our reader's; {mean:.2f} from what was recorded, on average"
    return found


def check_statistics(written: list[Recording], theirs: Mapping[str, np.ndarray], found: Survey) -> dict[str, str]:
    for key, values in (("observation.state", [one.state for one in written]), ("action", [one.action for one in written])):
        numbers = np.concatenate(values).astype(np.float64)
        wanted = {"min": numbers.min(axis=0), "max": numbers.max(axis=0), "mean": numbers.mean(axis=0), "std": numbers.std(axis=0)}
        for name, value in wanted.items():
            check(np.allclose(theirs[f"stats/{key}/{name}"], value, rtol=1e-6, atol=1e-7), f"{name} of {key}", "differs")
        for name, share in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
            off = np.abs(theirs[f"stats/{key}/{name}"] - np.quantile(numbers, share, axis=0)).max()
            check(bool(off <= 2e-3 * np.ptp(numbers, axis=0).max()), f"{name} of {key}", f"off by {off:.2g}")
        check(theirs[f"stats/{key}/count"].item() == len(numbers), f"count of {key}", "differs")
    check(found.windows == sum(LENGTHS) and not found.sets[0].bad, "survey", "ours finds bad episodes")
    return {"statistics": "min, max, mean, std to 1e-6; q01, q50, q99 to 0.2 % of the range; counts"}


if __name__ == "__main__":
    run_as_script(NAME, main)
