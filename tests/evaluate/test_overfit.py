"""The first thing a new policy has to do: learn one episode by heart, and be seen to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blm_jax.cli import main
from blm_jax.config import EmbodimentConfig, ObjectiveConfig
from blm_jax.data.demos import robots
from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.recorder import Recorder
from blm_jax.data.demos.robots import find_robot
from blm_jax.data.demos.survey import survey, write_survey
from blm_jax.recipe import CheckpointConfig, LogConfig, OptimizerConfig, Run, SetConfig, StageTwoConfig
from blm_jax.train.command import train_run
from blm_jax.weights.policy import new_policy
from tests.data.demos.recordings import shades
from tests.data.demos.stage_two import POLICY, SMALL
from tests.tiny_model import write_tiny_model

STEPS = 8  # of the episode
# Wide enough to tell moments and times apart, and nothing that would keep it from learning by heart.
BY_HEART = replace(
    POLICY,
    robots=("small",),
    horizon=SMALL.horizon,
    dit=replace(POLICY.dit, dropout=0.0, time_features=64),
    embodiment=EmbodimentConfig(state_width=2, action_width=2, hidden=64),
    # Times as near to actions as to noise: the last denoising steps are what is left of the error.
    objective=ObjectiveConfig(steps=8, draws=16, future_weight=0.0, beta=(1.0, 1.0)),
)


def write_episode(folder: Path) -> None:
    """An episode, and a model with a policy that was never trained."""
    time = np.linspace(0, 1, STEPS + 1)
    state = np.stack([np.sin(2 * np.pi * time), 0.5 + 0.5 * np.cos(3 * time)], axis=-1).astype(np.float32)
    with Recorder(folder / "small", SMALL, "rlds") as recorder:
        recorder.add(Recording("do it", state, state[1:], {"base": shades(16, 24, STEPS + 1, 0)}))
    found = survey([folder / "small"], SMALL)
    write_survey(folder / "small.json", found)
    (folder / "robots.yaml").write_text(robots.render({"small": SMALL}))
    new_policy(
        write_tiny_model(folder / "model"),
        BY_HEART,
        {"small": find_robot("small", robots.load_robots([folder / "robots.yaml"]))},
        {"small": found.statistics},
    )


def test_one_episode_is_learned_by_heart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Off by less than 1 % of each dimension's range; a robot that stays where it is is off by more than 20 %."""
    write_episode(tmp_path)
    model, episode, intents = (str(tmp_path / name) for name in ("model", "small", "intents"))
    of_robot = ["--robot", "small", "--robots-file", str(tmp_path / "robots.yaml")]
    made = ["--stats", str(tmp_path / "small.json"), "--out", intents, "--form", "float32", "--instruction-tokens", "8"]
    assert main(["data", "features", model, episode, *of_robot, *made]) == 0
    learned = SetConfig(episode, "small", str(tmp_path / "small.json"))
    run = Run(
        base=model,
        out=str(tmp_path / "run"),
        steps=600,
        batch=STEPS,
        optimizer=OptimizerConfig(rate=3e-3, betas=(0.9, 0.99), weight_decay=0.0),
        checkpoints=CheckpointConfig(every=1000),
        log=LogConfig(every=100),
        stage_two=StageTwoConfig((learned,), None, (str(tmp_path / "robots.yaml"),), (intents,), instruction_tokens=8),
    )
    train_run(run)
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    flags = ["--samples", "8", "--backbone", str(moved), "--json"]
    assert main(["eval", "openloop", str(tmp_path / "run"), episode, *of_robot, *flags]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["model"] == str(tmp_path / "run" / "checkpoints" / "600")
    found = result["robots"]["small"]["errors"]
    shares = {way: [one["mae_of_range"] for one in found[way]["dimensions"].values()] for way in ("policy", "hold", "mean", "replay")}
    assert max(shares["policy"]) < 0.01
    assert min(shares["hold"] + shares["mean"]) > 0.2
    assert max(shares["replay"]) == 0
