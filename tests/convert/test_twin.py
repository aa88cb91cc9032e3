"""The PyTorch module of an export against the policy in JAX: the same numbers, without JAX."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from blm_jax.batch import IntentRows, RobotRows
from blm_jax.config import ComputeConfig
from blm_jax.convert.twin.blm_policy import BLMPolicy, Intent
from blm_jax.data import robots as registry
from blm_jax.data import statistics
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.collate import collate
from blm_jax.data.observation import Observation, intent_tokens, messages_for
from blm_jax.data.pixels import read_pixel_config
from blm_jax.data.prompt import PromptEngine
from blm_jax.models.mllm import Mllm, with_params
from blm_jax.models.objective import Committed, sample
from blm_jax.models.policy import Policy
from blm_jax.weights.policy import PolicyFiles, write_policy
from blm_jax.weights.source import read_config
from tests.convert.policy_dirs import make_files, make_states, params_of
from tests.data.reference import processor
from tests.models import oracle
from tests.models.policies import make_intent, make_noise, make_policy, small
from tests.tiny_model import write_tiny_model

BOUND: dict[str, Any] = dict(atol=1e-4, rtol=0)  # float32, both sides
TIMES = np.linspace(0, 0.999, 16, dtype=np.float32)
PREFIX = 3
BATCHES = {name: (name,) * 3 for name in ("panda", "xarm6", "xarm7", "widowxai")} | {"mixed": ("xarm7", "widowxai", "panda")}


class Pair:
    """One policy on both sides, and a batch of padded intents."""

    def __init__(self, directory: Path, path: str):
        self.config = small(objective=dict(path=path, prefix=PREFIX))
        self.ours = make_policy(self.config)
        self.files = make_files(self.config)
        self.directory = directory / "policy"
        write_policy(self.directory, self.files, params_of(self.ours))
        self.twin = BLMPolicy.from_pretrained(self.directory)
        self.rows = make_intent(self.config, np.random.default_rng(3), [11, 4, 8], 11)
        self.intent = Intent(*(torch.from_numpy(np.asarray(part)) for part in (self.rows.hidden, self.rows.mask, self.rows.places)))

    def states(self, names: Sequence[str]) -> list[np.ndarray]:
        rng = np.random.default_rng(5)
        return [make_states(self.files.robots[name], rng, 1)[0] for name in names]


@pytest.fixture(scope="module", params=["flow", "ddim"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), request.param)


def robot_rows(files: PolicyFiles, names: Sequence[str], states: Sequence[np.ndarray]) -> RobotRows:
    config, known = files.config, [files.robots[name] for name in names]
    widths = config.embodiment
    encoded = [statistics.encode_state(state, files.statistics[name]) for name, state in zip(names, states, strict=True)]
    return RobotRows(
        np.array([config.robots.index(name) for name in names], np.int32),
        np.stack([registry.pad(state, widths.state_width) for state in encoded]),
        np.stack([registry.state_mask(robot, widths.state_width) for robot in known]),
        np.stack([registry.action_mask(robot, config.horizon, widths.action_width) for robot in known]),
    )


@jax.jit
def velocity(policy: Policy, intent: IntentRows, robots: RobotRows, noised: Any, time: Any, given: Any) -> Any:
    return policy.velocity(policy.condition(intent, robots), noised, time, given)


@partial(jax.jit, static_argnames=("steps", "guided"))
def sampled(
    policy: Policy, intent: IntentRows, robots: RobotRows, noise: Any, steps: int, committed: Any = None, guided: bool = True
) -> Any:
    return sample(policy, policy.condition(intent, robots), noise, steps, committed, guided=guided)


def decoded(files: PolicyFiles, names: Sequence[str], states: Sequence[np.ndarray], made: Any) -> list[np.ndarray]:
    chunks = []
    for name, state, chunk in zip(names, states, np.asarray(made).reshape(len(names), -1, *made.shape[1:]), strict=True):
        robot = files.robots[name]
        chunks.append(statistics.decode_actions(chunk[:, : robot.horizon, : len(robot.action)], state, files.statistics[name], robot))
    return chunks


def left_of(pair: Pair, names: Sequence[str], states: Sequence[np.ndarray], steps: int) -> list[np.ndarray]:
    """What the last chunk had left: near where the robot is, within its limits, and nothing of a dimension that never moves."""
    rng, last = np.random.default_rng(8), []
    for name, state in zip(names, states, strict=True):
        _, scale = statistics.affine(pair.files.statistics[name].action, pair.files.statistics[name].scheme)
        left = state + np.where(scale > 0, rng.normal(0, 0.05, (steps, len(state))), 0)
        last.append(registry.clip(left, pair.files.robots[name]))
    return last


def committed_of(pair: Pair, names: Sequence[str], states: Sequence[np.ndarray], last: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """As JAX reads it: where there is nothing, there is junk."""
    actions = np.full((len(names), samples, pair.config.horizon, pair.config.embodiment.action_width), 7.0, np.float32)
    for i, (name, state, left) in enumerate(zip(names, states, last, strict=True)):
        encoded = statistics.encode_actions(left, state, pair.files.statistics[name], pair.files.robots[name])
        actions[i, :, : encoded.shape[0], : encoded.shape[1]] = encoded
    return actions.reshape(-1, *actions.shape[2:])


def assert_close(found: Sequence[Any], wanted: Sequence[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **BOUND)


# --- the same numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("prefixes", [False, True], ids=["", "prefixes"])
def test_velocities(pair: Pair, batch: str, prefixes: bool) -> None:
    names = BATCHES[batch]
    rows = robot_rows(pair.files, names, pair.states(names))
    noised, time = make_noise(pair.config, 3 * len(TIMES)), np.tile(TIMES, 3)
    lengths = np.random.default_rng(2).integers(0, PREFIX + 1, (len(time), 1))
    given = np.arange(pair.config.horizon) < lengths if prefixes else None
    ours = velocity(pair.ours, pair.rows, rows, noised, time, given)
    condition = pair.twin.condition(
        pair.intent, torch.from_numpy(rows.robot).long(), *(torch.from_numpy(x) for x in (rows.state, rows.state_mask, rows.action_mask))
    )
    theirs = torch.from_numpy(noised), torch.from_numpy(time), None if given is None else torch.from_numpy(given)
    np.testing.assert_allclose(pair.twin.velocity(condition, *theirs), ours.actions, **BOUND)
    np.testing.assert_allclose(pair.twin.foresee(condition, *theirs), ours.future, **BOUND)
    each = np.asarray(ours.actions).reshape(3, len(TIMES), -1)
    assert (np.abs(np.diff(each, axis=1)).max(axis=-1) > 0.01).all() and np.abs(each).max() > 0.5  # the bound means something at this scale


@pytest.mark.parametrize("batch", BATCHES)
def test_sampled_actions(pair: Pair, batch: str) -> None:
    names = BATCHES[batch]
    states, noise = pair.states(names), make_noise(pair.config, 6)
    made = sampled(pair.ours, pair.rows, robot_rows(pair.files, names, states), noise, 5)
    found = pair.twin.sample_actions(pair.intent, names, states, noise=torch.from_numpy(noise).unflatten(0, (3, 2)), steps=5)
    wanted = decoded(pair.files, names, states, made)
    assert_close(found, wanted)
    for name, chunk in zip(names, found, strict=True):
        robot = pair.files.robots[name]
        low, high = registry.limits(robot.action)
        assert chunk.shape == (2, robot.horizon, len(robot.action))
        assert (chunk.numpy() >= low).all() and (chunk.numpy() <= high).all()
        assert ((chunk.numpy() > low) & (chunk.numpy() < high)).any()
        assert chunk[0].sub(chunk[1]).abs().max() > 0.01


@pytest.mark.parametrize("batch", ["xarm6", "mixed"])
@pytest.mark.parametrize(("delay", "left", "guided"), [(2, 4, False), (2, 4, True), (0, 5, True), (5, 5, True)])
def test_chunking_in_real_time(pair: Pair, batch: str, delay: int, left: int, guided: bool) -> None:
    names = BATCHES[batch]
    states, noise = pair.states(names), make_noise(pair.config, 6)
    last = left_of(pair, names, states, left)
    committed = Committed(committed_of(pair, names, states, last, 2), jnp.int32(delay), jnp.int32(left))  # pyright: ignore
    made = sampled(pair.ours, pair.rows, robot_rows(pair.files, names, states), noise, 5, committed, guided=guided)
    draw = torch.from_numpy(noise).unflatten(0, (3, 2))
    found = pair.twin.sample_actions(pair.intent, names, states, noise=draw, steps=5, last=last, delay=delay, guided=guided)
    assert_close(found, decoded(pair.files, names, states, made))
    for chunk, before in zip(found, last, strict=True):
        np.testing.assert_allclose(chunk[:, :delay], np.broadcast_to(before, (2, *before.shape))[:, :delay], atol=1e-5)
    # Left to itself, a policy that was trained with prefixes is given them as long as they are no longer than in training.
    chosen = pair.twin.sample_actions(pair.intent, names, states, noise=draw, steps=5, last=last, delay=delay)
    assert torch.equal(chosen[0], found[0]) == (guided != (0 < delay <= PREFIX))


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
def test_bfloat16_is_near(pair: Pair) -> None:
    names = BATCHES["mixed"]
    half = BLMPolicy.from_pretrained(pair.directory, dtype=torch.bfloat16)
    noise = torch.from_numpy(make_noise(pair.config, 3))[:, None]
    near, exact = (twin.sample_actions(pair.intent, names, pair.states(names), noise=noise) for twin in (half, pair.twin))
    for one, other in zip(near, exact, strict=True):
        assert one.dtype == torch.float32 and 0 < (one - other).abs().mean() < 0.02


# --- how it is computed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
def test_the_observation_is_read_once_for_all_steps_and_samples(pair: Pair) -> None:
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: counts.update({name: counts.get(name, 0) + 1})

    twin = pair.twin
    modules = {"bridge": twin.bridge, "state": twin.embodiments.state_inner, "actions": twin.embodiments.action_inner}
    modules |= {f"keys of {i}": block.cross.layer.k for i, block in enumerate(twin.dit.pairs)}
    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    names = BATCHES["mixed"]
    twin.sample_actions(pair.intent, names, pair.states(names), samples=4, steps=6)
    for hook in hooks:
        hook.remove()
    assert counts == {name: 6 if name == "actions" else 1 for name in modules}


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
@pytest.mark.parametrize("guided", [None, True])
def test_denoising_compiles_whole(pair: Pair, guided: bool | None) -> None:
    """fullgraph refuses whatever looks at numbers on the way; another backend would only be slower."""
    names = BATCHES["mixed"]
    states = pair.states(names)
    plain = dict(noise=torch.from_numpy(make_noise(pair.config, 3))[:, None], steps=2)
    chunking: dict[str, Any] = {} if guided is None else dict(last=left_of(pair, names, states, 4), delay=2, guided=guided)
    wanted = pair.twin.sample_actions(pair.intent, names, states, **plain, **chunking)
    twin = BLMPolicy.from_pretrained(pair.directory)
    twin.denoise = torch.compile(twin.denoise, backend="eager", fullgraph=True)
    assert_close(twin.sample_actions(pair.intent, names, states, **plain, **chunking), [chunk.numpy() for chunk in wanted])


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
def test_a_generator_decides(pair: Pair) -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pair.twin.sample_actions(pair.intent, ["panda"] * 3, pair.states(["panda"] * 3), samples=2, generator=generator)[1]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "blm_jax", "transformers"):
            raise ImportError(name + " is not to be had here")

sys.meta_path.insert(0, Refuse())
directory, given, made = sys.argv[1:]
sys.path.insert(0, directory)
from safetensors.torch import load_file, save_file
from blm_policy import BLMPolicy, Intent

policy, given = BLMPolicy.from_pretrained(directory), load_file(given)
intent = Intent(given["hidden"], given["mask"], given["places"])
(chunk,) = policy.sample_actions(intent, ["xarm6"], [given["state"]], noise=given["noise"])
save_file({"chunk": chunk}, made)
"""


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
def test_it_runs_where_jax_cannot_be_imported(pair: Pair, tmp_path: Path) -> None:
    (state,), noise = pair.states(["xarm6"]), torch.from_numpy(make_noise(pair.config, 1))[None]
    shutil.copytree(pair.directory, tmp_path / "policy")
    intent = Intent(*(part[:1].clone() for part in pair.intent))
    save_file({**intent._asdict(), "state": torch.from_numpy(state), "noise": noise}, tmp_path / "given")
    command = [sys.executable, "-I", "-c", ALONE, tmp_path / "policy", tmp_path / "given", tmp_path / "made"]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wanted,) = pair.twin.sample_actions(intent, ["xarm6"], [state], noise=noise)
    np.testing.assert_allclose(load_file(tmp_path / "made")["chunk"], wanted, atol=1e-6)


# --- from pictures and words to actions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", ["before", "after"])
def test_end_to_end_with_transformers(instruction: Any, hub: Path, torch_side: Any, tmp_path: Path) -> None:
    """transformers' processor and model and the twin, as its docstring says, against our prompt engine, backbone and policy."""
    backbone = read_config(hub)
    config = replace(small(objective=dict(steps=3)), intent_width=backbone.decoder.width, instruction=instruction)
    ours, files = make_policy(config), make_files(config)
    write_policy(tmp_path / "policy", files, params_of(ours))
    twin = BLMPolicy.from_pretrained(tmp_path / "policy")
    names, rng = ("widowxai", "panda"), np.random.default_rng(0)
    sizes = {"widowxai": (128, 128), "panda": (100, 180)}
    seen = [{camera: rng.integers(0, 256, (*sizes[name], 3), np.uint8) for camera in ("base", "wrist")} for name in names]
    words = ("lift the peg", "put the red cube on the green one, then push it over")
    states = [make_states(files.robots[name], rng, 1)[0] for name in names]
    noise = make_noise(config, 2)

    engine = PromptEngine(backbone, load_tokenizer(hub), read_pixel_config(hub))
    examples = []
    for name, images, text, state in zip(names, seen, words, states, strict=True):
        messages = messages_for(Observation(state, images, text), files.robots[name], instruction == "before")
        examples.append(engine.encode(messages, add_generation_prompt=True))
    mllm = with_params(backbone, ComputeConfig(), jax.tree.map(jnp.asarray, oracle.params_of(torch_side, backbone)))
    batch = jax.tree.map(jnp.asarray, collate([[example] for example in examples], backbone))
    hidden = jax.jit(Mllm.hidden, static_argnums=2)(mllm, batch, config.intent_block)
    mask, places = np.zeros(hidden.shape[:2], bool), np.zeros((*hidden.shape[:2], 4), np.int32)
    for i, example in enumerate(examples):
        n = len(example.tokens)
        mask[i, :n], places[i, :n] = intent_tokens(example, backbone)
    made = sampled(ours, IntentRows(hidden, mask, places), robot_rows(files, names, states), noise, 3)

    chats = [twin.messages(name, images, text) for name, images, text in zip(names, seen, words, strict=True)]
    for side in ("right", "left"):
        inputs: Any = processor(hub).apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True, padding_side=side
        )
        with runs_of(torch_side) as ran:
            intent = twin.intent(torch_side, inputs)
        assert ran == [f"model.language_model.layers.{i}" for i in range(config.intent_block)]
        for i, example in enumerate(examples):
            real = inputs["attention_mask"][i].bool()
            n = len(example.tokens)
            np.testing.assert_array_equal(intent.mask[i][real], mask[i, :n])
            np.testing.assert_array_equal(intent.places[i][real], places[i, :n])
            np.testing.assert_allclose(intent.hidden[i][real], hidden[i, :n], **BOUND)
            assert not intent.mask[i][~real].any()
        found = twin.sample_actions(intent, names, states, noise=torch.from_numpy(noise)[:, None])
        assert_close(found, decoded(files, names, states, made))
    with runs_of(torch_side) as ran:
        torch_side.generate(**inputs, max_new_tokens=1)
    assert ran == ["model.language_model.layers.0", "model.language_model.layers.1", "lm_head"]  # the backbone is as it was


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def torch_side(hub: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(hub).eval()  # pyright: ignore


@contextlib.contextmanager
def runs_of(model: Any) -> Iterator[list[str]]:
    """The names of the decoder's blocks and of the head, as they run."""
    ran: list[str] = []
    counted = {
        name: part for name, part in model.named_modules() if name == "lm_head" or name.rpartition(".")[0].endswith("language_model.layers")
    }
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in counted.items()]
    yield ran
    for hook in hooks:
        hook.remove()


# --- requests that cannot be met -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
def test_requests_that_cannot_be_met(pair: Pair, tmp_path: Path) -> None:
    twin, names = pair.twin, BATCHES["mixed"]
    states = pair.states(names)
    with pytest.raises(ValueError, match="not trained for ur5: it drives panda, xarm6, xarm7, widowxai"):
        twin.sample_actions(pair.intent, ["ur5", *names[1:]], states)
    for wrong in (states[0][:-1], np.full(8, np.nan)):
        with pytest.raises(ValueError, match=r"the state of xarm7 must be 8 finite numbers: joint1 \(rad\), .* gripper \(opening\)"):
            twin.sample_actions(pair.intent, names, [wrong, *states[1:]])
    with pytest.raises(ValueError, match="panda needs a picture of each of base, wrist, not of base"):
        twin.messages("panda", {"base": None}, "go")
    with pytest.raises(ValueError, match="as many steps left of its last chunk, and at least the delay of 3"):
        twin.sample_actions(pair.intent, names, states, last=left_of(pair, names, states, 2), delay=3)
    shutil.copytree(pair.directory, tmp_path / "policy")
    contract = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(contract | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this file reads 1"):
        BLMPolicy.from_pretrained(tmp_path / "policy")
