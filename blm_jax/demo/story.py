"""What `blm demo` does: parts of `blm` commands that anyone may type, and nothing beside them.

A part whose result lies in OUT/parts/ is not done again, so a demo that was cut off goes on. Its configs are those of configs/world, with
OUT in place of out/demo.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from blm_jax.data.files import open_path, read_json, write_whole
from blm_jax.errors import RequestError

Command = list[str]
Story = dict[str, dict[str, Command]]  # by the name of each part and of each of its commands
RunCommand = Callable[[Command], dict[str, Any]]  # what `blm COMMAND --json` prints

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "world"
HOME = "out/demo"  # in these configs
BASE = Path(__file__).resolve().parents[1] / "assets" / "base"  # as it comes with the package
ROBOTS = ("panda", "xarm6", "xarm7", "widowxai")
TASKS = ("PickCube", "PushCube", "PullCube")
TWO = "50%"  # of the demonstrations have two cubes: where there is always one, nothing teaches to read which is meant
EVERY = 8  # steps from one look of the demonstrations' cameras to the next, as stage_two.yaml has it
INSTRUCTION = 32  # tokens of the longest one, as stage_two.yaml has it
CONFIGURED = ("base", "stage_one", "stage_two")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    scenes: int = 3500  # asked about, to learn from
    tests: int = 200  # scenes that only the test asks about
    sentences: int = 1500
    demonstrations: tuple[int, ...] = (480, 210, 210)  # of each robot and task: of what is hardest most
    episodes: int = 50  # of each cell
    controls: int = 8  # of each cell, for each control


@dataclass(frozen=True)
class Demo:
    out: str = HOME
    seed: int = 0
    from_scratch: bool = False
    sizes: Sizes = Sizes()
    changes: tuple[str, ...] = ()  # KEY=VALUE of all runs

    def path(self, name: str) -> str:
        return f"{self.out}/{name}"

    @property
    def base(self) -> str:
        return self.path("base") if self.from_scratch else str(BASE)

    def robots(self) -> Iterator[tuple[str, str, str, str]]:
        """The name of each in the registry, its demonstrations, statistics and intents."""
        for robot in ROBOTS:
            name = f"world_{robot}"
            yield name, self.path(f"demonstrations/{name}"), self.path(f"stats/{name}.json"), self.path(f"intents/{name}")


def story(demo: Demo) -> Story:
    parts = {"data": _data(demo), "stage one": {"train": _train(demo, "stage_one", [f"base={demo.base}"])}}
    if demo.from_scratch:
        parts = {"base": {"new": ["new", demo.path("configs/base.yaml"), demo.base, *_seed(demo)]}, **parts}
    one, two, untrained, test = (demo.path(name) for name in ("stage_one", "stage_two", "untrained", "test"))
    parts["questions"] = {"answers": ["eval", "questions", one, test, "--out", demo.path("answers")]}
    run = ["--run", demo.path("configs/stage_two.yaml"), "--instruction-tokens", str(INSTRUCTION)]
    parts["intents"] = {
        name: ["data", "features", one, sets, "--robot", name, "--stats", stats, *run, "--out", intents]
        for name, sets, stats, intents in demo.robots()
    }
    parts["stage two"] = {
        "train": _train(demo, "stage_two"),
        # What the same policy does before it has learned: a step that changes nothing.
        "untrained": _train(demo, "stage_two", [f"out={untrained}", "steps=1", "optimizer.rate=1e-12"]),
    }
    parts["evaluation"] = _evaluation(demo, two, untrained)
    parts["export"] = {"export": ["convert", two, demo.path("export"), "--to", "hf"]}
    return parts


def _data(demo: Demo) -> dict[str, Command]:
    sizes, seed = demo.sizes, _seed(demo)
    asked, said, test, shown = (demo.path(name) for name in ("questions", "sentences", "test", "demonstrations"))
    return {
        "questions": ["data", "collect", "questions", asked, "--scenes", str(sizes.scenes), *seed],
        "test": ["data", "collect", "questions", test, "--scenes", str(sizes.tests), "--split", "test", *seed],
        "sentences": ["data", "collect", "questions", said, "--sentences", str(sizes.sentences), *seed],
        **{f"{name} corpus": _prepare(demo.path(name), demo.base) for name in ("questions", "sentences")},
        "demonstrations": demonstrations(shown, sizes.demonstrations, demo.seed),
        **{f"{name} statistics": ["data", "stats", sets, "--robot", name, "--out", stats] for name, sets, stats, _ in demo.robots()},
    }


def demonstrations(out: str, episodes: Sequence[int], seed: int) -> Command:
    """Of all robots."""
    return [
        "data",
        "collect",
        "world",
        out,
        *_tasks(),
        "--episodes",
        ",".join(map(str, episodes)),
        "--two",
        TWO,
        "--every",
        str(EVERY),
        "--seed",
        str(seed),
    ]


def _evaluation(demo: Demo, two: str, untrained: str) -> dict[str, Command]:
    def world(model: str, episodes: int, name: str, *flags: str) -> Command:
        return ["eval", "world", model, *_tasks(), "--episodes", str(episodes), "--out", demo.path(name), *flags]

    episodes, controls = demo.sizes.episodes, demo.sizes.controls
    return {
        "world": world(two, episodes, "world", "--films", "1"),
        "two": world(two, controls, "two", "--two"),
        "shuffled": world(two, controls, "two_shuffled", "--two", "--shuffled"),
        "blind": world(two, controls, "world_blind", "--blind"),
        "untrained": world(untrained, controls, "world_untrained"),
    }


def _train(demo: Demo, config: str, changes: Command | None = None) -> Command:
    return ["train", demo.path(f"configs/{config}.yaml"), f"seed={demo.seed}", *(changes or []), *demo.changes]


def _prepare(source: str, model: str) -> Command:
    return ["data", "prepare", source, "--model", model, "--out", f"{source}.corpus"]


def _seed(demo: Demo) -> Command:
    return ["--seed", str(demo.seed)]


def _tasks() -> Command:
    return ["--tasks", ",".join(TASKS)]


# --- playing it ----------------------------------------------------------------------------------------------------------


def play(demo: Demo, run: RunCommand) -> dict[str, dict[str, Any]]:
    """All parts one after the other. By part: the seconds it took, and what its commands said."""
    directory, parts = open_path(demo.out), story(demo)
    _begin(demo, directory, parts)
    told: dict[str, dict[str, Any]] = {}
    for number, (name, commands) in enumerate(parts.items(), 1):
        note = directory / "parts" / f"{name.replace(' ', '_')}.json"
        if not note.exists():
            print(f"\n{number} of {len(parts)}: {name}", file=sys.stderr, flush=True)
            start, found = time.perf_counter(), {}
            for what, command in commands.items():
                print(f"$ {line(command)}", file=sys.stderr, flush=True)
                found[what] = _done(command) or run(command)
            write_whole(note, json.dumps({"seconds": time.perf_counter() - start, "found": found}, indent=1).encode() + b"\n")
        told[name] = read_json(note)
    return told


def line(command: Command) -> str:
    return shlex.join(["blm", *command])


def _done(command: Command) -> dict[str, Any]:
    """What of a part that was cut off is there already, of commands that write all or nothing and refuse to write it again."""
    outs = {"new": 2, "convert": 2, "collect": 3}
    place = next((outs[word] for word in command[:2] if word in outs), None)
    return {"out": command[place]} if place is not None and open_path(command[place]).exists() else {}


def _begin(demo: Demo, directory: epath.Path, parts: Story) -> None:
    if "://" in demo.out:
        raise RequestError(f"--out {demo.out} lies in a bucket: name a local directory")
    if not CONFIGS.is_dir():
        raise RequestError(f"the demo is run from a checkout of the repository: {CONFIGS} is not there")
    note, now = directory / "demo.json", {name: [line(command) for command in commands.values()] for name, commands in parts.items()}
    if note.exists():
        if read_json(note) != now:
            raise RequestError(f"{demo.out} holds another demo, of another seed, base or release: choose another --out, or remove it")
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RequestError(f"{demo.out} exists and is no demo: choose another --out, or remove it")
    if not demo.from_scratch and not BASE.is_dir():
        raise RequestError("the small base that the demo begins from is not in this checkout yet: make it with --from-scratch")
    for name in CONFIGURED:
        text = (CONFIGS / f"{name}.yaml").read_text().replace(f"{HOME}/", f"{demo.out}/")
        write_whole(directory / "configs" / f"{name}.yaml", text.encode())
    write_whole(note, json.dumps(now, indent=1).encode() + b"\n")
