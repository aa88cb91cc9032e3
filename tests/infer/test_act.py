"""`blm act`: from an .npz of observations to an .npz of chunks, on any mesh, and the same as the PyTorch twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import blm_jax
from blm_jax.cli import main
from blm_jax.config import BridgeConfig, ComputeConfig, DiTConfig, EmbodimentConfig, MeshConfig, ObjectiveConfig, PolicyConfig
from blm_jax.convert.twin.blm_policy import BLMPolicy, Intent
from blm_jax.data.observation import Observation
from blm_jax.data.robots import Robot
from blm_jax.infer.act import Actor, load_actor, noise_of
from blm_jax.mesh import make_mesh
from blm_jax.models.policy import Policy
from blm_jax.weights.policy import write_policy
from tests.convert.policy_dirs import make_files, make_states, params_of
from tests.tiny_model import write_tiny_model

CONFIG = PolicyConfig(
    intent_block=1,
    intent_width=64,
    horizon=8,
    bridge=BridgeConfig(queries=4, blocks=1, width=32, heads=2, ffn=48),
    dit=DiTConfig(layers=4, heads=2, head_dim=16, ffn=48, tap=2, time_features=16),
    embodiment=EmbodimentConfig(state_width=12, action_width=10, hidden=24),
    objective=ObjectiveConfig(steps=3),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("models") / "model")
    params = params_of(Policy(CONFIG, ComputeConfig(), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf + rng.normal(0, 0.1, leaf.shape), np.float32), params)
    write_policy(directory / "policy", make_files(CONFIG), params)
    return directory


@pytest.fixture(scope="module")
def actor(model: Path) -> Actor:
    return load_actor(str(model))


def observe(robot: Robot, seed: int, instruction: str = "Put the red cube on the green one.") -> Observation:
    rng = np.random.default_rng(seed)
    images = {camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8) for camera in robot.cameras}
    return Observation(make_states(robot, rng, 1)[0], images, instruction)


def write_observations(path: Path, observations: list[Observation], **changes: np.ndarray) -> Path:
    arrays: dict[str, Any] = {"state": np.stack([one.state for one in observations])}
    arrays["instruction"] = np.array([one.instruction for one in observations])
    for name in dict(observations[0].images):
        arrays[f"images/{name}"] = np.stack([dict(one.images)[name] for one in observations])
    merged: dict[str, Any] = arrays | changes
    np.savez(path, **merged)
    return path


def test_the_command(model: Path, actor: Actor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robot = actor.files.robots["panda"]
    observations = [observe(robot, 0), observe(robot, 1, "Push.")]
    source = write_observations(tmp_path / "seen.npz", observations)
    arguments = ["act", str(model), "--observations", str(source), "--robot", "panda", "--samples", "3", "--seed", "5", "--json"]
    assert main([*arguments, "--out", str(tmp_path / "one.npz")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["observations"], result["samples"], result["horizon"]) == (2, 3, robot.horizon)
    chunks = np.load(tmp_path / "one.npz")["actions"]
    assert chunks.shape == (2, 3, robot.horizon, len(robot.action))
    low, high = (np.array([getattr(dimension, side) for dimension in robot.action]) for side in ("low", "high"))
    assert np.isfinite(chunks).all() and (chunks >= low - 1e-6).all() and (chunks <= high + 1e-6).all()
    expected = actor.sample_actions(observations, ["panda"] * 2, samples=3, seed=5)
    np.testing.assert_allclose(chunks, np.stack(expected), atol=1e-5)
    assert main([*arguments, "--out", str(tmp_path / "one.npz")]) == 2  # it is there
    assert "exists" in capsys.readouterr().err


def test_only_what_control_needs_is_read(actor: Actor) -> None:
    assert actor.backbone.config.decoder.layers == CONFIG.intent_block
    assert actor.backbone.decoder.head is None


def test_robots_may_be_mixed_and_rows_do_not_meet(actor: Actor) -> None:
    names = ["widowxai", "panda", "xarm6", "xarm7", "panda"]
    observations = [observe(actor.files.robots[name], seed) for seed, name in enumerate(names)]
    mixed = actor.sample_actions(observations, names, samples=2, seed=1)
    assert [chunk.shape for chunk in mixed] == [
        (2, actor.files.robots[name].horizon, len(actor.files.robots[name].action)) for name in names
    ]
    first = actor.sample_actions(observations[:1], names[:1], samples=2, seed=1)
    np.testing.assert_allclose(first[0], mixed[0], atol=1e-5)
    assert np.abs(actor.sample_actions(observations[:1], names[:1], samples=2, seed=2)[0] - mixed[0]).max() > 1e-3


def test_sharded_equals_unsharded(model: Path, actor: Actor) -> None:
    names = ["panda", "xarm6", "widowxai"]
    observations = [observe(actor.files.robots[name], seed) for seed, name in enumerate(names)]
    expected = actor.sample_actions(observations, names, samples=2)
    sharded = load_actor(str(model), make_mesh(MeshConfig(2, 2, 2)))
    for ours, theirs in zip(sharded.sample_actions(observations, names, samples=2), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_in_python(model: Path, actor: Actor) -> None:
    """One object answers and acts."""
    observation = observe(actor.files.robots["xarm6"], 3)
    whole = blm_jax.load(str(model))
    expected = actor.sample_actions([observation], ["xarm6"], samples=2, seed=4)[0]
    np.testing.assert_allclose(whole.sample_actions(observation, "xarm6", samples=2, seed=4), expected, atol=1e-5)


def test_the_twin_acts_alike(model: Path, actor: Actor) -> None:
    """From the same intent and noise; the twin's own way from pictures to intent has tests of its own."""
    robot = actor.files.robots["xarm7"]
    observation = observe(robot, 6)
    batch, mask, places = actor._prompts([actor._encode(observation, robot)])
    hidden = actor.backbone.hidden(batch, CONFIG.intent_block)
    twin = BLMPolicy.from_pretrained(str(model / "policy"))
    intent = Intent(*(torch.tensor(np.asarray(x)) for x in (hidden, mask, places)))
    noise = torch.tensor(np.asarray(noise_of(9, 1, 2, CONFIG)))[None]
    theirs = twin.sample_actions(intent, ["xarm7"], [observation.state], samples=2, noise=noise)
    ours = actor.sample_actions([observation], ["xarm7"], samples=2, seed=9)[0]
    np.testing.assert_allclose(ours, np.asarray(theirs[0]), atol=1e-4)


WRONG = {
    "no such robot": (["--robot", "pnda"], {}, "panda"),
    "state too short": ([], {"state": np.zeros((1, 3))}, "state"),
    "state not finite": ([], {"state": np.full((1, 8), np.nan)}, "finite"),
    "camera of another size": ([], {"images/base": np.zeros((1, 64, 64, 3), np.uint8)}, "base"),
    "camera unknown": ([], {"images/ceiling": np.zeros((1, 128, 128, 3), np.uint8)}, "ceiling"),
    "no steps": (["--steps", "0"], {}, "at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_one_line(model: Path, actor: Actor, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    flags, changes, expected = WRONG[name]
    source = write_observations(tmp_path / "seen.npz", [observe(actor.files.robots["panda"], 0)], **changes)
    arguments = ["act", str(model), "--observations", str(source), "--robot", "panda", "--out", str(tmp_path / "out.npz"), *flags]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error
    assert not (tmp_path / "out.npz").exists()


def test_a_model_without_a_policy_says_so(tmp_path: Path, actor: Actor, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path / "bare")
    source = write_observations(tmp_path / "seen.npz", [observe(actor.files.robots["panda"], 0)])
    arguments = ["act", str(tmp_path / "bare"), "--observations", str(source), "--robot", "panda", "--out", str(tmp_path / "out.npz")]
    assert main(arguments) == 2
    assert "policy" in capsys.readouterr().err
