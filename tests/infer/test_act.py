"""From observations to chunks: on any mesh, in one go or from an intent made before, standing or moving, and the same as the twin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import blm_jax
from blm_jax.cli import main
from blm_jax.config import ComputeConfig, MeshConfig
from blm_jax.convert.twin.blm_policy import BLMPolicy
from blm_jax.convert.twin.blm_policy import Intent as TwinIntent
from blm_jax.data.demos import statistics
from blm_jax.data.demos.observation import Observation, write_chunks
from blm_jax.data.demos.robots import load_robots
from blm_jax.errors import RequestError
from blm_jax.infer import command
from blm_jax.infer.act import Actor, Intent, denoise, load_actor, noise_of
from blm_jax.mesh import make_mesh
from blm_jax.models.embodiment import add_robot
from blm_jax.models.policy import abstract_policy, policy_with_params
from blm_jax.weights.policy import load_policy_params, read_policy, with_robot, write_policy
from tests.convert.policy_dirs import make_params
from tests.data.demos.test_robots import MINE
from tests.tiny_model import write_tiny_model
from tests.tiny_policy import CONFIG, observe, write_observations, write_tiny_policy

NAMES = ("widowxai", "panda", "xarm6", "xarm7")  # chunks of 6, 7, 5 and 7 steps; one whose actions are absolute
LEFT = 4  # steps of the last chunks, at most those of the shortest


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these small products, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(write_tiny_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def actor(model: Path) -> Actor:
    return load_actor(str(model))


@pytest.fixture(scope="module")
def observations(actor: Actor) -> list[Observation]:
    return [observe(actor.files.robots[name], seed) for seed, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def intent(actor: Actor, observations: list[Observation]) -> Intent:
    return actor.intent(observations, NAMES)


@pytest.fixture(scope="module")
def chunks(actor: Actor, observations: list[Observation]) -> list[np.ndarray]:
    return actor.sample_actions(observations, NAMES, samples=2, seed=1)


def assert_close(found: Sequence[Any], wanted: Sequence[Any], atol: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


# --- in one go ---------------------------------------------------------------------------------------------------------------


def test_the_command_on_a_mesh(
    model: Path, actor: Actor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the robot moves, as that holds all there is; against one device and an intent made before."""
    robot = actor.files.robots["panda"]
    seen, names = [observe(robot, seed) for seed in range(4)], ["panda"] * 4
    source = write_observations(tmp_path / "seen.npz", seen)
    last = np.stack([one.state for one in seen])[:, None, None] + np.random.default_rng(8).normal(0, 0.03, (4, 2, robot.horizon, 8))
    write_chunks(tmp_path / "last.npz", last, robot)
    arguments = ["act", str(model), "--observations", str(source), "--robot", "panda", "--samples", "2", "--seed", "5", "--json"]
    arguments += ["--last", str(tmp_path / "last.npz"), "--delay", "2"]
    arguments += ["--mesh", "data=2,fsdp=2,tensor=2", "--out", str(tmp_path / "next.npz")]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["observations"], result["samples"], result["horizon"]) == (4, 2, robot.horizon)
    made = np.load(tmp_path / "next.npz")["actions"]
    assert made.shape == (4, 2, robot.horizon, len(robot.action))
    low, high = (np.array([getattr(dimension, side) for dimension in robot.action]) for side in ("low", "high"))
    assert np.isfinite(made).all() and (made >= low - 1e-6).all() and (made <= high + 1e-6).all()
    left = np.load(tmp_path / "last.npz")["actions"][:, :, robot.executed :]
    np.testing.assert_array_equal(made[:, :, :2], left[:, :, :2])
    apart = actor.intent(seen, names)
    assert_close(made, actor.sample_actions(seen, names, samples=2, seed=5, intent=apart, last=left, delay=2))
    assert main(arguments) == 2  # it is there
    assert "exists" in capsys.readouterr().err


def test_only_what_control_needs_is_read(actor: Actor) -> None:
    assert actor.backbone.config.decoder.layers == CONFIG.intent_block
    assert actor.backbone.decoder.head is None


def test_robots_may_be_mixed_and_rows_do_not_meet(actor: Actor, observations: list[Observation], chunks: list[np.ndarray]) -> None:
    robots = [actor.files.robots[name] for name in NAMES]
    assert [chunk.shape for chunk in chunks] == [(2, robot.horizon, len(robot.action)) for robot in robots]
    names = (NAMES[0], "xarm7", "panda", "panda")
    others = [observations[0], *(observe(actor.files.robots[name], 9 + i) for i, name in enumerate(names[1:]))]
    assert_close(actor.sample_actions(others, names, samples=2, seed=1)[:1], chunks[:1])
    assert np.abs(actor.sample_actions(observations, NAMES, samples=2, seed=2)[0] - chunks[0]).max() > 1e-3


# --- from an intent made before ------------------------------------------------------------------------------------------------


def test_an_intent_apart(actor: Actor, observations: list[Observation], chunks: list[np.ndarray], intent: Intent) -> None:
    """Acted on with the states of now; pictures and words are not looked at again."""
    blind = [replace(observation, images={}, instruction="") for observation in observations]
    assert_close(actor.sample_actions(blind, NAMES, samples=2, seed=1, intent=intent), chunks, atol=1e-6)
    moved = [replace(one, state=observe(actor.files.robots[name], 9).state) for one, name in zip(blind, NAMES, strict=True)]
    whole = [replace(one, state=other.state) for one, other in zip(observations, moved, strict=True)]
    found = actor.sample_actions(moved, NAMES, samples=2, seed=1, intent=intent)
    assert_close(found, actor.sample_actions(whole, NAMES, samples=2, seed=1), atol=1e-6)
    assert np.abs(found[0] - chunks[0]).max() > 1e-3
    with pytest.raises(RequestError, match="the intent is of widowxai, panda, xarm6, xarm7, the actions are asked for panda"):
        actor.sample_actions(blind[1:2], ["panda"], intent=intent)


def test_on_a_mesh_an_intent_is_divided(model: Path, observations: list[Observation], intent: Intent) -> None:
    """It stays where it was made. Of three rows, so that there is one that only fills the mesh."""
    divided = load_actor(str(model), make_mesh(MeshConfig(2, 2, 2))).intent(observations[:3], NAMES[:3])
    assert divided.robots == NAMES[:3]
    assert isinstance(divided.rows.hidden, jax.Array) and {x.data.shape[0] for x in divided.rows.hidden.addressable_shards} == {1}
    np.testing.assert_array_equal(divided.rows.mask[:3], intent.rows.mask[:3])
    real = np.asarray(intent.rows.mask[:3])
    np.testing.assert_allclose(np.asarray(divided.rows.hidden[:3])[real], np.asarray(intent.rows.hidden[:3])[real], atol=1e-4)
    assert not divided.rows.mask[3].any()


# --- while the robot moves -----------------------------------------------------------------------------------------------------


def last_of(actor: Actor, observations: Sequence[Observation]) -> list[np.ndarray]:
    """What is left of chunks made where the robots were a moment ago: near where they are now, in another place each sample."""
    rng, left = np.random.default_rng(8), []
    for observation, name in zip(observations, NAMES, strict=True):
        robot = actor.files.robots[name]
        chunk = observation.state + rng.normal(0, 0.03, (2, LEFT, len(robot.action)))
        left.append(np.clip(chunk, [d.low for d in robot.action], [d.high for d in robot.action]).astype(np.float32))
    return left


@pytest.fixture(scope="module", params=[0, CONFIG.objective.prefix], ids=["guided", "prefix"])
def mover(request: pytest.FixtureRequest, actor: Actor) -> Actor:
    """The same weights, as if they had been trained with so many given steps."""
    config = replace(CONFIG, objective=replace(CONFIG.objective, prefix=request.param))
    policy = policy_with_params(config, ComputeConfig(), jax.tree.map(jnp.asarray, make_params(CONFIG)))
    return Actor(actor.backbone, policy, replace(actor.files, config=config), actor.engine, None)


@pytest.fixture(scope="module")
def twin(model: Path) -> BLMPolicy:
    return BLMPolicy.from_pretrained(model / "policy")


def test_chunks_in_real_time(
    mover: Actor, twin: BLMPolicy, observations: list[Observation], intent: Intent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed robots: what is committed is kept, what follows is the twin's, and one program serves every delay."""
    prefix = mover.policy.config.objective.prefix
    monkeypatch.setattr(twin.config.objective, "prefix", prefix)
    last, states = last_of(mover, observations), [observation.state for observation in observations]
    seen = TwinIntent(*(torch.tensor(np.asarray(x)) for x in (intent.rows.hidden, intent.rows.mask, intent.rows.places)))
    noise = torch.tensor(np.asarray(noise_of(1, 4, 2, CONFIG))).unflatten(0, (4, 2))
    before = programs()
    for delay in (0, 1, 2) if prefix else (0, 1, LEFT):
        options: dict[str, Any] = dict(last=last, delay=delay)
        found = mover.sample_actions(observations, NAMES, samples=2, seed=1, intent=intent, **options)
        for chunk, old in zip(found, last, strict=True):
            np.testing.assert_array_equal(chunk[:, :delay], old[:, :delay])
        assert_close(found, twin.sample_actions(seen, NAMES, states, noise=noise, **options), atol=1e-4)
        # One chunk that is left, for all samples.
        alike = mover.sample_actions(observations, NAMES, samples=2, seed=1, intent=intent, last=[x[0] for x in last], delay=delay)
        np.testing.assert_array_equal(alike[0][1, :delay], last[0][0, :delay])
    assert programs() <= before + 1


def programs() -> int:
    return denoise._cache_size()  # pyright: ignore


def test_in_python(model: Path, actor: Actor, observations: list[Observation], intent: Intent) -> None:
    """One object answers and acts, on one observation as on several."""
    whole, last = blm_jax.load(str(model)), last_of(actor, observations)
    options: dict[str, Any] = dict(samples=2, seed=1, delay=1)
    one = whole.intent(observations[0], NAMES[0])
    found = whole.sample_actions(observations[0], NAMES[0], intent=one, last=last[0], **options)
    assert_close([found], actor.sample_actions(observations, NAMES, intent=intent, last=last, **options)[:1])


@pytest.mark.parametrize("mover", [0], indirect=True, ids=["guided"])
def test_it_goes_on_from_the_last_chunk(mover: Actor, observations: list[Observation], chunks: list[np.ndarray], intent: Intent) -> None:
    """Steps that are not decided are drawn towards what was planned, and without a last chunk they are elsewhere."""
    last = last_of(mover, observations)
    found = mover.sample_actions(observations, NAMES, samples=2, seed=1, intent=intent, last=last, delay=1)
    for name, new, plain, old in zip(NAMES, found, chunks, last, strict=True):
        _, scale = statistics.affine(mover.files.statistics[name].action, mover.files.statistics[name].scheme)
        moves = scale > 0
        near, far = (np.abs(chunk[:, 1:LEFT, moves] - old[:, 1:, moves]).mean() for chunk in (new, plain))
        assert near < 0.8 * far


def test_the_model_reads_the_last_chunk_relative_to_the_state_of_now(actor: Actor, observations: list[Observation]) -> None:
    """By hand: a joint of a relative robot, its gripper, and a joint of an absolute one."""
    last, states = last_of(actor, observations), [observation.state for observation in observations]
    robots = [actor.files.robots[name] for name in NAMES]
    committed = actor._committed(last, 1, states, robots, 4)
    actions = np.asarray(committed.actions).reshape(4, 2, CONFIG.horizon, -1)
    assert (int(committed.delay), int(committed.overlap)) == (1, LEFT)
    for row, dimension, start in ((1, 2, states[1][2]), (1, 7, 0.0), (3, 2, 0.0)):
        summary, scheme = (getattr(actor.files.statistics[NAMES[row]], what) for what in ("action", "scheme"))
        center, scale = (x[dimension] for x in statistics.affine(summary, scheme))
        np.testing.assert_allclose(actions[row, :, :LEFT, dimension], (last[row][..., dimension] - start - center) / scale, atol=1e-5)


def test_chunking_that_cannot_be(mover: Actor, observations: list[Observation], intent: Intent) -> None:
    """The rest of what `check_last` refuses is tested beside it."""
    last = last_of(mover, observations)

    def ask(**options: Any) -> str:
        with pytest.raises(RequestError) as caught:
            mover.sample_actions(observations, NAMES, samples=2, intent=intent, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "of which chunk?" in ask(delay=1)
    assert "the delay is 5: it is a whole number of steps, from 0 to the 4 left" in ask(last=last, delay=5)
    assert "more than the 6 of a chunk" in ask(last=[np.repeat(x, 2, axis=1) for x in last])
    assert "action 0 (joint_0) of widowxai's last chunk is nan" in ask(last=[x * np.nan for x in last])
    if mover.policy.config.objective.prefix:
        assert "the delay is 3 steps, but the policy was trained with at most 2 given" in ask(last=last, delay=3)


def test_the_command_reads_what_is_left(
    model: Path, actor: Actor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the steps that the file does not call executed. What an actor makes of them is tested above."""
    robot, asked = actor.files.robots["panda"], {}
    source = write_observations(tmp_path / "seen.npz", [observe(robot, 0), observe(robot, 1)])
    rng = np.random.default_rng(0)
    middle = np.array([(dimension.low + dimension.high) / 2 for dimension in robot.action])
    earlier = {count: (middle + rng.normal(0, 0.1, (2, count, robot.horizon, 8))).astype(np.float32) for count in (1, 3)}
    for count, actions in earlier.items():
        write_chunks(tmp_path / f"{count}.npz", actions, robot)
    earlier = {count: np.load(tmp_path / f"{count}.npz")["actions"] for count in earlier}

    class Recorder:
        def sample_actions(self, observations: Any, robots: Any, **options: Any) -> list[np.ndarray]:
            asked.update(options)
            return [np.tile(middle.astype(np.float32), (options["samples"], robot.horizon, 1))] * len(observations)

    monkeypatch.setattr(command, "load_actor", lambda *_: Recorder())

    def run(last: Path, *flags: str) -> int:
        (tmp_path / "out.npz").unlink(missing_ok=True)
        arguments = ["act", str(model), "--observations", str(source), "--robot", "panda", "--out", str(tmp_path / "out.npz")]
        return main([*arguments, "--last", str(last), *flags])

    assert run(tmp_path / "1.npz", "--delay", "2", "--samples", "3") == 0
    assert asked["delay"] == 2
    np.testing.assert_array_equal(asked["last"], earlier[1][:, 0, robot.executed :])
    assert run(tmp_path / "3.npz", "--samples", "3") == 0
    assert asked["delay"] == 0
    np.testing.assert_array_equal(asked["last"], earlier[3][:, :, robot.executed :])
    capsys.readouterr()
    for path, flags, says in (
        (tmp_path / "3.npz", ["--samples", "2"], "panda's last chunk has the shape [3, 4, 8], not [steps, 8] or"),
        (tmp_path / "1.npz", ["--delay", "5"], "the delay is 5: it is a whole number of steps, from 0 to the 4 left"),
        (source, [], "has no actions, robot, executed: it is no file of chunks"),
    ):
        assert run(path, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error and not (tmp_path / "out.npz").exists()


# --- as the twin -----------------------------------------------------------------------------------------------------------------


def test_the_twin_acts_alike(twin: BLMPolicy, observations: list[Observation], chunks: list[np.ndarray], intent: Intent) -> None:
    """From the same intent and noise; the twin's own way from pictures to intent has tests of its own."""
    seen = TwinIntent(*(torch.tensor(np.asarray(x)) for x in (intent.rows.hidden, intent.rows.mask, intent.rows.places)))
    noise = torch.tensor(np.asarray(noise_of(1, 4, 2, CONFIG))).unflatten(0, (4, 2))
    theirs = twin.sample_actions(seen, NAMES, [observation.state for observation in observations], noise=noise)
    assert_close(chunks, theirs, atol=1e-4)


# --- requests that cannot be met ---------------------------------------------------------------------------------------------------


WRONG = {
    "no such robot": (["--robot", "pnda"], {}, "the policy has no row for the robot 'pnda'; did you mean panda?"),
    "state too short": ([], {"state": np.zeros((1, 3))}, "state"),
    "state not finite": ([], {"state": np.full((1, 8), np.nan)}, "finite"),
    "camera of another size": ([], {"images/base": np.zeros((1, 64, 64, 3), np.uint8)}, "base"),
    "camera unknown": ([], {"images/ceiling": np.zeros((1, 128, 128, 3), np.uint8)}, "ceiling"),
    "no steps": (["--steps", "0"], {}, "at least 1"),
    "a delay of nothing": (["--delay", "2"], {}, "of which chunk?"),
}


def refused(model: Path, actor: Actor, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str, **changes: np.ndarray) -> str:
    source = write_observations(folder / "seen.npz", [observe(actor.files.robots["panda"], 0)], **changes)
    arguments = ["act", str(model), "--observations", str(source), "--robot", "panda", "--out", str(folder / "out.npz"), *flags]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (folder / "out.npz").exists()
    return error


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_one_line(model: Path, actor: Actor, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    flags, changes, expected = WRONG[name]
    assert expected in refused(model, actor, tmp_path, capsys, *flags, **changes)


def test_a_model_without_a_policy_or_with_anothers(model: Path, actor: Actor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model.iterdir():
        if path.is_file():
            (bare / path.name).symlink_to(path)
    assert "policy" in refused(bare, actor, tmp_path, capsys)
    config = replace(CONFIG, intent_width=48)
    write_policy(bare / "policy", replace(actor.files, config=config), make_params(config))
    assert "reads block 1 of a backbone 48 wide, but this one has 2 blocks and is 64 wide" in refused(bare, actor, tmp_path, capsys)


def test_a_robot_of_the_users(model: Path, actor: Actor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known by its file, given a row, and refused until it was trained; and a file that says otherwise than what was stored."""
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    text = MINE.replace("horizon: 10", "horizon: 8")
    mine.write_text(text)
    other.write_text(text.replace("high: 0.5", "high: 0.6"))
    robot = load_robots([mine])["my_arm"]
    flags = ["--robot", "my_arm", "--robots-file"]
    assert "the policy has no row for the robot 'my_arm'; it drives panda" in refused(model, actor, tmp_path, capsys, *flags, str(mine))

    params = load_policy_params(model, abstract_policy(CONFIG))
    files = with_robot(actor.files, robot)
    grown = tmp_path / "grown"
    write_policy(grown / "policy", files, add_robot(params, CONFIG))
    assert read_policy(grown) == files and list(files.robots)[-1] == "my_arm"
    error = refused(grown, actor, tmp_path, capsys, *flags, str(mine))
    assert "has a row for my_arm, but was not trained for it: it drives panda, xarm6, xarm7, widowxai" in error
    error = refused(grown, actor, tmp_path, capsys, *flags, str(other))
    assert "other.yaml: robot my_arm is not the one that is stored with the policy: state.1.high is 0.6, there 0.5" in error
