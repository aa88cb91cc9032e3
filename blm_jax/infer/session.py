"""A MODEL in memory, ready to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.config import BackboneConfig, ComputeConfig, SamplingConfig
from blm_jax.data.chat import Tokenizer
from blm_jax.data.demos.observation import Observation
from blm_jax.data.files import read_json
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.errors import RequestError
from blm_jax.infer.act import Actor, Intent, load_policy
from blm_jax.infer.generate import Generator
from blm_jax.models.mllm import Mllm, abstract_params, with_params
from blm_jax.weights.engine import open_engine
from blm_jax.weights.load import load_params
from blm_jax.weights.policy import check_backbone, has_policy, read_policy
from blm_jax.weights.source import assets_dir, read_config

# Messages as OpenAI and transformers write them, or what the prompt engine made of them already.
Conversation = Sequence[Mapping[str, Any]] | Example


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"] | None  # the model ended it, or the room did; None in a piece that more will follow
    prompt_tokens: int


@dataclass(frozen=True)
class Habits:
    """What the model's generation_config.json says of answers: the ids that end them, and the penalty on repetition."""

    stop: tuple[int, ...]
    repetition_penalty: float

    @classmethod
    def read(cls, assets: epath.Path, tokenizer: Tokenizer) -> Habits:
        path = assets / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        stop = settings.get("eos_token_id", tokenizer.eos)
        ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
        penalty = settings.get("repetition_penalty")
        penalty = 1.0 if penalty is None else penalty
        if not all(isinstance(token, int) for token in ids) or not isinstance(penalty, int | float) or penalty <= 0:
            raise RequestError(f"{path}: eos_token_id must hold token ids, and repetition_penalty be a number above 0")
        return cls(tuple(ids), float(penalty))


class Model:
    """What `blm_jax.load` gives."""

    def __init__(self, mllm: Mllm, engine: PromptEngine, habits: Habits, mesh: Mesh | None, actor: Actor | None = None):
        self.config: BackboneConfig = mllm.config
        self.mesh = mesh
        self.engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self.habits = habits
        self.actor = actor
        self._generator = Generator(mllm, mesh, mllm.config.tokens.pad)

    def generate(self, messages: Conversation, sampling: SamplingConfig | None = None) -> Answer:
        return self.generate_batch([messages], sampling)[0]

    def generate_batch(self, conversations: Sequence[Conversation], sampling: SamplingConfig | None = None) -> list[Answer]:
        """Answers to conversations of any lengths, decoded side by side."""
        sampling = self._complete(sampling)
        stops = {*self.habits.stop, *sampling.stop}
        if not conversations:
            return []
        examples = [self._encode(messages) for messages in conversations]
        parts = list(self._generator.stream(examples, sampling, stops))
        rows = np.concatenate(parts, axis=1).tolist()
        return [self._answer(example, row, stops) for example, row in zip(examples, rows, strict=True)]

    def stream(self, messages: Conversation, sampling: SamplingConfig | None = None, every: int = 4) -> Iterator[Answer]:
        """The answer in pieces of `every` tokens, each an Answer of what is new. They add up to what `generate` gives, and the
        last says how it ended."""
        sampling = self._complete(sampling)
        stops = {*self.habits.stop, *sampling.stop}
        example = self._encode(messages)
        text = self.tokenizer.stream()
        ended = False
        for tokens in self._generator.stream([example], sampling, stops, every):
            row, ended = _until(tokens[0].tolist(), stops)
            piece = "".join(text.push(token) for token in (row[:-1] if ended else row))
            yield Answer(piece, tuple(row), None, len(example.tokens))
        yield Answer(text.finish(), (), "stop" if ended else "length", len(example.tokens))

    def sample_actions(
        self,
        observation: Observation,
        robot: str,
        *,
        samples: int = 1,
        seed: int = 0,
        steps: int | None = None,
        intent: Intent | None = None,
        last: Any = None,
        delay: int = 0,
    ) -> np.ndarray:
        """Chunks of actions in the robot's own units, [samples, horizon, dims]; see `Actor.sample_actions`."""
        several = None if last is None else [last]
        actor = self._acting()
        return actor.sample_actions(
            [observation], [robot], samples=samples, seed=seed, steps=steps, intent=intent, last=several, delay=delay
        )[0]

    def intent(self, observation: Observation, robot: str) -> Intent:
        """The backbone's part of `sample_actions`."""
        return self._acting().intent([observation], [robot])

    def _acting(self) -> Actor:
        if self.actor is None:
            raise RequestError("this MODEL has no policy/: it answers questions, and drives no robot")
        return self.actor

    def _complete(self, sampling: SamplingConfig | None) -> SamplingConfig:
        sampling = sampling or SamplingConfig()
        if sampling.repetition_penalty is None:
            return replace(sampling, repetition_penalty=self.habits.repetition_penalty)
        return sampling

    def _encode(self, messages: Conversation) -> Example:
        return messages if isinstance(messages, Example) else self.engine.encode(messages, add_generation_prompt=True)

    def _answer(self, example: Example, tokens: list[int], stops: set[int]) -> Answer:
        kept, ended = _until(tokens, stops)
        text = self.tokenizer.decode(kept[:-1] if ended else kept)
        return Answer(text, tuple(kept), "stop" if ended else "length", len(example.tokens))


def _until(tokens: list[int], stops: set[int]) -> tuple[list[int], bool]:
    """Tokens up to the first that ends an answer, itself included, and whether there was one."""
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1], True
    return tokens, False


def load(
    path: str,
    mesh: Mesh | None = None,
    compute: ComputeConfig | None = None,
    engine: PromptEngine | None = None,
    backbone: str | None = None,
) -> Model:
    """Open a MODEL, of the Hub's layout or a checkpoint, and put it on a mesh; by default on the first device.

    `backbone` is where the frozen weights of a training checkpoint lie, if they were moved.
    """
    compute = compute or ComputeConfig()
    config = read_config(path)
    if mesh is not None:
        meshes.check(config, mesh)
    engine = engine or open_engine(path)
    habits = Habits.read(assets_dir(path), engine.tokenizer)
    params = load_params(path, abstract_params(config, jnp.dtype(compute.dtype), mesh), backbone)
    mllm = for_serving(config, compute, params)
    actor = None
    if has_policy(path):
        files = read_policy(path)
        check_backbone(files.config, config)
        actor = Actor(mllm, load_policy(path, files, mesh, compute), files, engine, mesh)
    return Model(mllm, engine, habits, mesh, actor)


def for_serving(config: BackboneConfig, compute: ComputeConfig, params: dict[str, Any]) -> Mllm:
    """The model with the decoder's layers apart, which decoding reads without copying. `params` is used up.

    One stacked parameter is taken apart at a time, so memory never holds two copies of the weights.
    """
    blocks: list[dict[str, Any]] = [{} for _ in range(config.decoder.layers)]
    for name, leaves in params["decoder"].pop("blocks").items():
        for leaf, stacked in leaves.items():
            for block, one in zip(blocks, _apart(stacked), strict=True):
                block.setdefault(name, {})[leaf] = one
            stacked.delete()
    params["decoder"]["blocks"] = dict(enumerate(blocks))
    return with_params(config, compute, params, apart=True)


def _apart(stacked: jax.Array) -> list[jax.Array]:
    """The layers of a stacked parameter, each divided over the mesh as the stack was."""
    return jax.jit(lambda stacked: list(stacked), out_shardings=meshes.of_one_layer(stacked.sharding))(stacked)
