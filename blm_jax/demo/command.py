"""`blm demo`: the story played, its end compared with PyTorch, and all of it told on one page."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from blm_jax.data.corpora.sources import open_source
from blm_jax.data.demos.moments import instruction_at
from blm_jax.data.demos.observation import Observation
from blm_jax.data.demos.robots import load_robots
from blm_jax.data.demos.sets import open_set, read_episode, read_pictures
from blm_jax.data.files import open_path, read_json, write_whole
from blm_jax.demo.compare import largest_difference
from blm_jax.demo.page import page
from blm_jax.demo.story import Demo, RunCommand, line, play, story

Told = Mapping[str, Any]

PACKAGES = ("blm-jax", "jax", "jaxlib", "flax", "numpy")
COMPARED = 3  # moments of each robot
ALIKE = 1e-4  # radians, that PyTorch's actions may be off
CONTROLS = ("untrained", "blind", "two", "shuffled")
AIMS = (  # what is asked of the defaults: which number, whether it is the least or the most, and what it must be
    ("episodes that succeed", lambda told: told["world"]["all"]["success"], "least", 0.8),
    ("of the worst robot and task", lambda told: min(cell["success"] for cell in told["world"]["cells"]), "least", 0.5),
    ("of PickCube", lambda told: told["world"]["by_task"]["PickCube"]["success"], "least", 0.6),
    ("the right one of two cubes", lambda told: told["controls"]["two"]["right"], "least", 0.8),
    ("the right one where the other is named", lambda told: told["controls"]["shuffled"]["right"], "most", 0.5),
    ("seeing nothing", lambda told: told["controls"]["blind"]["success"], "most", 0.15),
    ("not trained", lambda told: told["controls"]["untrained"]["success"], "most", 0.15),
    ("questions answered rightly", lambda told: told["questions"]["all"]["right"], "least", 0.85),
    ("more than without seeing", lambda told: told["questions"]["all"]["right"] - told["questions"]["all"]["blind"], "least", 0.3),
    ("places within 2 cm", lambda told: told["questions"]["types"]["place"]["right"], "least", 0.8),
    ("PyTorch's actions off by", lambda told: told["export"]["largest_difference"], "most", ALIKE),
)


def demo(asked: Demo, run: RunCommand) -> dict[str, Any]:
    """What `blm demo --json` prints."""
    parts = play(asked, run)
    directory, found = open_path(asked.out), {name: part["found"] for name, part in parts.items()}
    note = directory / "parts" / "comparison.json"
    if not note.exists():
        write_whole(note, json.dumps({"largest_difference": _compare(asked)}).encode() + b"\n")
    evaluation = found["evaluation"]
    told: dict[str, Any] = {
        "seed": asked.seed,
        "from_scratch": asked.from_scratch,
        "seconds": {name: part["seconds"] for name, part in parts.items()},
        "total_seconds": sum(part["seconds"] for part in parts.values()),
        **{f"stage_{number}": {"run": f"stage_{number}", "steps": found[f"stage {number}"]["train"]["step"]} for number in ("one", "two")},
        "questions": found["questions"]["answers"],
        "answers": _answers(asked, directory),
        "world": evaluation["world"],
        "controls": {name: evaluation[name]["all"] for name in CONTROLS},
        "export": {"path": asked.path("export"), **read_json(note), "robots": [name for name, *_ in asked.robots()]},
        "commands": {name: [line(command) for command in commands.values()] for name, commands in story(asked).items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": {"devices": f"{jax.device_count()} {jax.devices()[0].device_kind}", "cores": os.cpu_count()},
    }
    told["checks"] = [_check(told, *aim) for aim in AIMS]
    write_whole(directory / "index.html", page(told, directory).encode())
    write_whole(directory / "report.json", json.dumps(told, indent=1).encode() + b"\n")
    return {**told, "page": asked.path("index.html")}


def _check(told: Told, what: str, number: Callable[[Told], float | None], side: str, bound: float) -> dict[str, Any]:
    value = number(told)
    holds = value is not None and (value >= bound if side == "least" else value <= bound)
    return {"what": what, "value": value, "bound": bound, "side": side, "holds": holds}


def _answers(asked: Demo, directory: epath.Path) -> list[dict[str, Any]]:
    """Each with its pictures, relative to the demo's directory."""
    source = open_source(asked.path("test"))
    records = (source.read(item) for piece in source.pieces(1024) for item in piece.items)
    lines = (json.loads(text) for text in (directory / "answers" / "answers.jsonl").read_text().splitlines())
    return [{**answer, "pictures": [f"test/{name}" for name in record["images"]]} for answer, record in zip(lines, records, strict=True)]


def _compare(asked: Demo) -> float | None:
    """At the beginnings of some demonstrations of each robot."""
    known, observations, robots = load_robots(), [], []
    for name, path, *_ in asked.robots():
        robot, source = known[name], open_set(path)
        for number in range(min(COMPARED, source.count)):
            episode = read_episode(source, robot, number)
            pictures = {camera.name: read_pictures(source, robot, number, camera.name, [0])[0] for camera in robot.cameras}
            observations.append(Observation(episode.state[0], pictures, instruction_at(episode, 0)))
            robots.append(name)
    return largest_difference(asked.path("export"), observations, robots, asked.seed)


def as_text(told: Told) -> str:
    lines = [
        f"{one['what']:<42} {'not measured' if one['value'] is None else format(one['value'], '.3g'):>12}   "
        f"{'>=' if one['side'] == 'least' else '<='} {one['bound']:<6g} {'holds' if one['holds'] else 'does not hold'}"
        for one in told["checks"]
    ]
    return "\n".join([*lines, "", f"all together {told['total_seconds'] / 60:.1f} minutes; see {told['page']}"])
