"""Everything a small run needs on disk: a model, a corpus, demonstrations of two robots, cached intents; and its config."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blm_jax.cli import main
from blm_jax.config import PolicyConfig
from blm_jax.configfile import render
from blm_jax.data.command import prepare
from blm_jax.data.demos import robots
from blm_jax.data.demos.survey import write_survey
from blm_jax.recipe import (
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    Run,
    SetConfig,
    StageOneConfig,
    StageTwoConfig,
)
from blm_jax.weights.engine import open_engine
from tests.data.corpora.material import write_source
from tests.data.demos.stage_two import POLICY, ROBOTS, make_stage
from tests.tiny_model import write_tiny_model

OWN = replace(POLICY, robots=("small", "my_arm"))


@dataclass(frozen=True)
class World:
    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def robots_files(self) -> tuple[str, ...]:
        return (str(self.folder / "robots.yaml"),)

    def sets(self, *names: str, **settings: Any) -> tuple[SetConfig, ...]:
        return tuple(SetConfig(str(self.folder / name), name, str(self.folder / f"{name}.json"), **settings) for name in names or ROBOTS)

    def stage_one(self, out: Path, **settings: Any) -> Run:
        stage = StageOneConfig({str(self.folder / "corpus"): "1"}, length=128)
        return self._run(out, stage_one=stage, **settings)

    def stage_two(self, out: Path, *, cached: bool = False, policy: PolicyConfig | None = OWN, **settings: Any) -> Run:
        intents = tuple(str(self.folder / f"{name}.intents") for name in ROBOTS) if cached else ()
        stage = StageTwoConfig(self.sets(), policy, self.robots_files(), intents, instruction_tokens=8)
        return self._run(out, stage_two=stage, **{"steps": 30, **settings})

    def _run(self, out: Path, **settings: Any) -> Run:
        numbers: dict[str, Any] = {
            "steps": 8,
            "batch": 4,
            "optimizer": OptimizerConfig(rate=1e-3),
            "checkpoints": CheckpointConfig(every=3),
            "log": LogConfig(every=1),
            "evaluation": EvaluationConfig(batches=2),
        }
        return Run(base=self.model, out=str(out), **{**numbers, **settings})


def make_world(folder: Path) -> World:
    world = World(folder)
    write_tiny_model(folder / "model")
    records = write_source(folder / "source", 60)
    prepare(str(records), partial(open_engine, world.model), str(folder / "corpus"), workers=0, max_tokens=128, max_bad=1.0)
    stage = make_stage(folder, folder / "model")
    for name, found in stage.surveys.items():
        write_survey(folder / f"{name}.json", found)
    (folder / "robots.yaml").write_text(robots.render(ROBOTS))
    return world


def make_intents(world: World, model: str) -> None:
    """`model` has the policy whose block is cached."""
    for name in ROBOTS:
        flags = ["--robot", name, "--robots-file", world.robots_files()[0], "--stats", str(world.folder / f"{name}.json")]
        flags += ["--out", str(world.folder / f"{name}.intents"), "--form", "float32", "--instruction-tokens", "8"]
        assert main(["data", "features", model, str(world.folder / name), *flags]) == 0


def write(run: Run, path: Path) -> Path:
    path.write_text(render(run))
    return path


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What the run told of its steps."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row or "action" in row]
