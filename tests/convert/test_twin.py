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
from blm_jax.config import BackboneConfig, ComputeConfig, Instruction, PolicyConfig
from blm_jax.convert.twin.blm_policy import BLMPolicy, Intent
from blm_jax.convert.twin.blm_policy import Committed as TwinCommitted
from blm_jax.convert.twin.blm_policy import Robot as TwinRobot
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.collate import collate
from blm_jax.data.demos import robots as registry
from blm_jax.data.demos import statistics
from blm_jax.data.demos.observation import Observation, intent_tokens, messages_for
from blm_jax.data.positions import Grid
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.vision.pixels import read_pixel_config
from blm_jax.models.mllm import Mllm, with_params
from blm_jax.models.objective import Committed, sample
from blm_jax.models.policy import Policy, policy_with_params
from blm_jax.weights.policy import PolicyFiles, write_policy
from blm_jax.weights.source import read_config
from tests.convert.policy_dirs import make_files, make_params, make_states
from tests.data.reference import processor
from tests.models import oracle
from tests.models.chats import MIXED, VIDEO, make_example, torch_inputs
from tests.models.policies import SMALL, make_intent, make_noise, small
from tests.tiny_model import write_tiny_model

BOUND: dict[str, Any] = dict(atol=1e-4, rtol=0)  # float32, both sides
TIMES = np.linspace(0, 0.999, 16, dtype=np.float32)
PREFIX = 3
BATCHES = {name: (name,) * 3 for name in ("panda", "xarm6", "xarm7", "widowxai")} | {"mixed": ("xarm7", "widowxai", "panda")}


def policy_of(config: PolicyConfig) -> Policy:
    return policy_with_params(config, ComputeConfig(), jax.tree.map(jnp.asarray, make_params(config)))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these small products, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Pair:
    """One policy on both sides, and a batch of padded intents."""

    def __init__(self, directory: Path, config: PolicyConfig):
        self.config = config
        self.ours, self.files = policy_of(self.config), make_files(self.config)
        self.directory = directory / "policy"
        write_policy(self.directory, self.files, make_params(self.config))
        self.twin = BLMPolicy.from_pretrained(self.directory)
        self.rows = make_intent(self.config, np.random.default_rng(3), [11, 4, 8], 11)
        self.intent = Intent(*(torch.from_numpy(np.asarray(part)) for part in (self.rows.hidden, self.rows.mask, self.rows.places)))

    def states(self, names: Sequence[str]) -> list[np.ndarray]:
        rng = np.random.default_rng(5)
        return [make_states(self.files.robots[name], rng, 1)[0] for name in names]


CONFIGS = {path: small(objective=dict(path=path, prefix=PREFIX), dit=dict(norms=path != "clean")) for path in ("flow", "clean", "ddim")}
CONFIGS["patched"] = replace(
    small(objective=dict(path="clean"), dit=dict(norms=False)), horizon=8, embodiment=replace(SMALL.embodiment, patch=2)
)


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


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


@partial(jax.jit, static_argnames="steps")
def sampled(policy: Policy, intent: IntentRows, robots: RobotRows, noise: Any, steps: int) -> Any:
    return sample(policy, policy.condition(intent, robots), noise, steps)


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


def assert_close(found: Sequence[Any], wanted: Sequence[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **BOUND)


# --- the same numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pair", ["flow", "patched"], indirect=True)
def test_velocities(pair: Pair, batch: str) -> None:
    """At 16 times, with given steps and without. The path has no part in them."""
    names, prefix = BATCHES[batch], pair.config.objective.prefix
    rows = robot_rows(pair.files, names, pair.states(names))
    noised, time = make_noise(pair.config, 3 * len(TIMES)), np.tile(TIMES, 3)
    condition = pair.twin.condition(
        pair.intent, torch.from_numpy(rows.robot).long(), *(torch.from_numpy(x) for x in (rows.state, rows.state_mask, rows.action_mask))
    )
    for lengths in (np.zeros((len(time), 1), int), np.random.default_rng(2).integers(0, prefix + 1, (len(time), 1))):
        given = np.arange(pair.config.horizon) < lengths
        ours = velocity(pair.ours, pair.rows, rows, noised, time, given if prefix else None)
        theirs = torch.from_numpy(noised), torch.from_numpy(time), torch.from_numpy(given) if given.any() else None
        np.testing.assert_allclose(pair.twin.velocity(condition, *theirs), ours.actions, **BOUND)
        np.testing.assert_allclose(pair.twin.foresee(condition, *theirs), ours.future, **BOUND)
        each = np.asarray(ours.actions).reshape(3, len(TIMES), -1)
        assert (np.abs(np.diff(each, axis=1)).max(axis=-1) > 0.01).all() and np.abs(each).max() > 0.5  # the bound means something


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
        # The noise has its say; less of it where the actions themselves are said.
        assert chunk[0].sub(chunk[1]).abs().max() > (1e-3 if pair.config.objective.path == "clean" else 0.01)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("pair", ["flow", "clean"], indirect=True)
def test_chunks_that_go_on_from_the_last_one(pair: Pair, guided: bool) -> None:
    """Towards all that is left of it, or with its first steps given: these the network sees as they are, whatever it sees of the others."""
    names, noise, last = BATCHES["mixed"], make_noise(pair.config, 3), make_noise(pair.config, 3, seed=1)
    rows = robot_rows(pair.files, names, pair.states(names))
    committed = Committed(jnp.asarray(last), jnp.int32(2), jnp.int32(5))

    @jax.jit
    def run(policy: Policy) -> jax.Array:
        return sample(policy, policy.condition(pair.rows, rows), noise, 5, committed, guided=guided)

    condition = pair.twin.condition(
        pair.intent, torch.from_numpy(rows.robot).long(), *(torch.from_numpy(x) for x in (rows.state, rows.state_mask, rows.action_mask))
    )
    theirs = TwinCommitted(torch.from_numpy(last), torch.tensor(2), torch.tensor(5))
    found, free = (pair.twin.denoise(condition, torch.from_numpy(noise), 5, one, guided=guided) for one in (theirs, None))
    np.testing.assert_allclose(found, run(pair.ours), **BOUND)
    assert (found - free)[:, 2:].abs().max() > 0.01  # what is decided has its say on what follows


@pytest.mark.parametrize("scheme", ["quantile", "mean_std", "min_max"])
def test_robots_read_and_say_numbers_alike(scheme: statistics.Scheme) -> None:
    """Of dimensions that never move, all but never move, move seldom, and of one that has outliers."""
    robot, rng = registry.load_robots()["panda"], np.random.default_rng(0)
    states = make_states(robot, rng, 400)
    states[:, 0], states[:, 1] = 0.3, 1e-8 * rng.standard_normal(400)
    states[:, 2] = np.where(np.arange(400) == 7, 2.0, 1e-4 * rng.standard_normal(400))
    states[:, 7] = np.arange(400) == 9
    actions = states[:, None] + 0.05 * rng.standard_normal((400, robot.horizon, 8)) * (np.arange(8) > 2)
    numbers = statistics.from_arrays(robot, states, actions, scheme=scheme)
    theirs = TwinRobot(robot, numbers, 0)
    for state, chunk in zip(states[5:10], actions[5:10], strict=True):
        read = theirs.encode_actions(torch.from_numpy(chunk), torch.from_numpy(state))
        np.testing.assert_allclose(theirs.encode_state(torch.from_numpy(state)), statistics.encode_state(state, numbers), rtol=1e-6)
        np.testing.assert_allclose(read, statistics.encode_actions(chunk, state, numbers, robot), rtol=1e-5, atol=1e-6)
        said = theirs.decode_actions(read, torch.from_numpy(state))
        np.testing.assert_allclose(said, statistics.decode_actions(read.numpy(), state, numbers, robot), rtol=1e-6)


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
def test_denoising_compiles_whole(pair: Pair) -> None:
    """fullgraph refuses whatever looks at numbers on the way; one program serves every delay. Another backend would only be slower."""
    names = BATCHES["mixed"]
    states = pair.states(names)
    options: dict[str, Any] = dict(
        noise=torch.from_numpy(make_noise(pair.config, 3))[:, None], steps=1, last=left_of(pair, names, states, 4)
    )
    twin, graphs = BLMPolicy.from_pretrained(pair.directory), []
    twin.config.objective.prefix = 0  # guided: the longest way
    wanted = [twin.sample_actions(pair.intent, names, states, **options, delay=delay) for delay in (2, 3)]

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    twin.denoise = torch.compile(twin.denoise, backend=count, fullgraph=True)
    for delay, chunks in zip((2, 3), wanted, strict=True):
        assert_close(twin.sample_actions(pair.intent, names, states, **options, delay=delay), [chunk.numpy() for chunk in chunks])
    assert len(graphs) == 1


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


def test_end_to_end_with_transformers(hub: Path, torch_side: Any, tmp_path: Path) -> None:
    """transformers' processor and model and the twin, as its docstring says, against our prompt engine, backbone and policy."""
    backbone = read_config(hub)
    config = replace(small(objective=dict(steps=3)), intent_width=backbone.decoder.width)
    ours, files = policy_of(config), make_files(config)
    write_policy(tmp_path / "policy", files, make_params(config))
    twin = BLMPolicy.from_pretrained(tmp_path / "policy")
    names, rng = ("widowxai", "panda"), np.random.default_rng(0)
    sizes = {"widowxai": (128, 128), "panda": (100, 180)}
    seen = [{camera: rng.integers(0, 256, (*sizes[name], 3), np.uint8) for camera in ("base", "wrist")} for name in names]
    words = ("lift the peg", "put the red cube on the green one, then push it over")
    states = [make_states(files.robots[name], rng, 1)[0] for name in names]
    noise = make_noise(config, 2)

    engine = PromptEngine(backbone, load_tokenizer(hub), read_pixel_config(hub))
    mllm = with_params(backbone, ComputeConfig(), jax.tree.map(jnp.asarray, oracle.params_of(torch_side, backbone)))
    for twin.config.instruction in ("before", "after", "alone"):
        examples = []
        for name, images, text, state in zip(names, seen, words, states, strict=True):
            messages = messages_for(Observation(state, images, text), files.robots[name], twin.config.instruction == "before")
            examples.append(engine.encode(messages, add_generation_prompt=True))
        rows = intent_of(mllm, examples, config.intent_block, twin.config.instruction)
        made = sampled(ours, rows, robot_rows(files, names, states), noise, 3)

        chats = [twin.messages(name, images, text) for name, images, text in zip(names, seen, words, strict=True)]
        for side in ("right", "left"):
            inputs: Any = processor(hub).apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True, padding_side=side
            )
            with runs_of(torch_side) as ran:
                intent = twin.intent(torch_side, inputs)
            assert ran == [f"model.language_model.layers.{i}" for i in range(config.intent_block)]
            assert_same_intent(intent, rows, inputs["attention_mask"], examples)
            found = twin.sample_actions(intent, names, states, noise=torch.from_numpy(noise)[:, None])
            assert_close(found, decoded(files, names, states, made))
    with runs_of(torch_side) as ran:
        torch_side.generate(**inputs, max_new_tokens=1)
    assert ran == ["model.language_model.layers.0", "model.language_model.layers.1", "lm_head"]  # the backbone is as it was


@pytest.mark.parametrize("pair", ["flow"], indirect=True)
def test_videos(pair: Pair, hub: Path, torch_side: Any) -> None:
    """Beside pictures and alone, in the same batch, in this order and in that."""
    backbone = replace(read_config(hub), video_positions="transformers-5.23")
    mllm = with_params(backbone, ComputeConfig(), jax.tree.map(jnp.asarray, oracle.params_of(torch_side, backbone)))
    grids = (MIXED, (*VIDEO, Grid(1, 4, 4)), VIDEO)
    examples = [prompt_of(make_example(backbone, some, seed, words=4)) for seed, some in enumerate(grids)]
    inputs = torch_inputs(examples, backbone)
    assert {"pixel_values", "pixel_values_videos", "video_grid_thw"} <= set(inputs)
    intent = pair.twin.intent(torch_side, inputs)
    assert_same_intent(intent, intent_of(mllm, examples, pair.config.intent_block), inputs["attention_mask"], examples)
    assert intent.places[1, :, 3].max() == VIDEO[0].frames - 1 and intent.places[1, :, 0].max() == 2
    for name in ("video_grid_thw", "image_grid_thw"):
        with pytest.raises(ValueError, match="pictures and their tokens do not match"):
            pair.twin._places(*kinds_and_grids(inputs, backbone, without=name), merge=2)


def prompt_of(example: Example) -> Example:
    return replace(example, supervised=np.zeros_like(example.supervised))


def kinds_and_grids(inputs: dict[str, Any], backbone: BackboneConfig, without: str) -> Any:
    kinds = (inputs["input_ids"] == backbone.tokens.image).int() + 2 * (inputs["input_ids"] == backbone.tokens.video).int()
    return kinds, [inputs[name].tolist()[: -1 if name == without else None] for name in ("image_grid_thw", "video_grid_thw")]


def intent_of(mllm: Mllm, examples: Sequence[Example], blocks: int, instruction: Instruction = "after") -> IntentRows:
    """Padded to one length, so that one program serves all."""
    batch = jax.tree.map(jnp.asarray, collate([[example] for example in examples], mllm.config, length=128))
    hidden = jax.jit(Mllm.hidden, static_argnums=2)(mllm, batch, blocks)
    mask, places = np.zeros(hidden.shape[:2], bool), np.zeros((*hidden.shape[:2], 4), np.int32)
    for i, example in enumerate(examples):
        n = len(example.tokens)
        mask[i, :n], places[i, :n] = intent_tokens(example, mllm.config, instruction)
    return IntentRows(hidden, mask, places)


def assert_same_intent(found: Intent, wanted: IntentRows, attention: torch.Tensor, examples: Sequence[Example]) -> None:
    """Ours is padded on the right."""
    for i, example in enumerate(examples):
        real, n = attention[i].bool(), len(example.tokens)
        np.testing.assert_array_equal(found.mask[i][real], wanted.mask[i, :n])
        np.testing.assert_array_equal(found.places[i][real], wanted.places[i, :n])
        np.testing.assert_allclose(found.hidden[i][real], wanted.hidden[i, :n], **BOUND)
        assert not found.mask[i][~real].any()


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
    for picture in (np.zeros((4, 8, 8, 3)), [None]):
        with pytest.raises(ValueError, match="panda's camera wrist gives one picture, not several or a video"):
            twin.messages("panda", {"base": None, "wrist": picture}, "go")
    with pytest.raises(ValueError, match="there is a prompt without a picture, and intent begins with one"):
        twin._places(torch.zeros(1, 5, dtype=torch.int), [[], []], merge=2)
    last = left_of(pair, names, states, 4)
    for left, delay, says in (
        ([one[:2] for one in last], 3, "as many steps left of its last chunk, and at least the delay of 3"),
        ([last[0][:2], *last[1:]], 1, "as many steps left of its last chunk"),
        (last, 4, "the delay is 4 steps, but the policy was trained with at most 3 given"),
        ([last[0][:, :-1], *last[1:]], 1, r"what is left of xarm7's last chunk must be \[steps, 8\] or \[1, steps, 8\] finite numbers"),
        ([last[0] * np.nan, *last[1:]], 1, "finite numbers"),
        ([np.tile(one, (3, 1)) for one in last], 1, "at most 7 steps"),
        (None, 1, "of which chunk"),
    ):
        with pytest.raises(ValueError, match=says):
            twin.sample_actions(pair.intent, names, states, last=left, delay=delay)
    shutil.copytree(pair.directory, tmp_path / "policy")
    contract = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(contract | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this file reads 1"):
        BLMPolicy.from_pretrained(tmp_path / "policy")


@pytest.mark.parametrize("pair", ["flow", "clean"], indirect=True)
def test_an_export_of_before_there_were_norms(pair: Pair, tmp_path: Path) -> None:
    """All LayerNorms normalised. The path "clean" was another, and actions would be wrong without a word."""
    shutil.copytree(pair.directory, tmp_path / "policy")
    contract = json.loads((tmp_path / "policy" / "config.json").read_text())
    del contract["policy"]["dit"]["norms"]
    (tmp_path / "policy" / "config.json").write_text(json.dumps(contract))
    if pair.config.objective.path == "clean":
        with pytest.raises(ValueError, match="is of an older release's path clean: take the"):
            BLMPolicy.from_pretrained(tmp_path / "policy")
        return
    names, noise = BATCHES["mixed"], torch.from_numpy(make_noise(pair.config, 3))[:, None]
    old, new = (
        twin.sample_actions(pair.intent, names, pair.states(names), noise=noise)
        for twin in (BLMPolicy.from_pretrained(tmp_path / "policy"), pair.twin)
    )
    assert_close(old, [chunk.numpy() for chunk in new])
