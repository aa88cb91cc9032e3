"""From observations to chunks of actions: the backbone up to block k, the bridge and the denoiser, in one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.batch import IntentRows, Prompts, RobotRows
from blm_jax.config import ComputeConfig, PolicyConfig, below_block
from blm_jax.data.demos.observation import Observation, check, check_last, check_state, encode, prompts_of
from blm_jax.data.demos.robots import Robot, action_mask, pad, state_mask
from blm_jax.data.demos.statistics import decode_actions, encode_actions, encode_state
from blm_jax.data.prompt import PromptEngine
from blm_jax.errors import RequestError
from blm_jax.infer.generate import bucket
from blm_jax.models.mllm import Mllm, abstract_params, with_params
from blm_jax.models.objective import Committed, sample
from blm_jax.models.policy import Policy, abstract_policy, policy_with_params
from blm_jax.weights.engine import open_engine
from blm_jax.weights.load import load_params
from blm_jax.weights.policy import PolicyFiles, check_backbone, load_policy_params, read_policy
from blm_jax.weights.source import read_config


@dataclass(frozen=True)
class Intent:
    """What the backbone makes of observations. It stays on the devices, divided as the mesh divides rows."""

    robots: tuple[str, ...]  # whose, one an observation
    rows: IntentRows  # of these observations, then of none, to as many as the mesh divides


class Actor:
    """A policy and as much of its backbone as it needs."""

    def __init__(self, backbone: Mllm, policy: Policy, files: PolicyFiles, engine: PromptEngine, mesh: Mesh | None):
        self.backbone = backbone
        self.policy = policy
        self.files = files
        self.engine = engine
        self.mesh = mesh

    def intent(self, observations: Sequence[Observation], robots: Sequence[str]) -> Intent:
        """The backbone's part of `sample_actions`, for as many calls of it as wanted."""
        known = self._find(observations, robots)
        prompts = self._prompts([check(observation, robot) for observation, robot in zip(observations, known, strict=True)], known)
        with meshes.use(self.mesh):
            return Intent(tuple(robots), look(self.backbone, prompts, self.policy.config.intent_block))

    def sample_actions(
        self,
        observations: Sequence[Observation],
        robots: Sequence[str],
        *,
        samples: int = 1,
        seed: int = 0,
        first: int = 0,
        steps: int | None = None,
        intent: Intent | None = None,
        last: Sequence[Any] | None = None,
        delay: int = 0,
    ) -> list[np.ndarray]:
        """Chunks in the robot's own units and limits, [samples, horizon, dims] for each observation; robots may differ.

        Noise depends on the seed and an observation's number: here they are counted from `first`, so that many may come in parts.

        With `intent`, made of these observations or of earlier ones, only their states are read, and the backbone does not run.

        To make chunks while the robot moves, give what is left of the `last` ones, [left, dims] or [samples, left, dims] for each
        observation, beginning with the step at which the state was read, and how many of these steps will have been executed
        when the new chunk is ready: the `delay`. The new chunk begins with these, and goes on smoothly.
        """
        known = self._find(observations, robots)
        left = check_last(last, delay, known, samples, self.policy.config.objective.prefix)
        if intent is None:
            checked = [check(observation, robot) for observation, robot in zip(observations, known, strict=True)]
            states, seen = [observation.state for observation in checked], self._prompts(checked, known)
        else:
            if intent.robots != tuple(robots):
                raise RequestError(f"the intent is of {', '.join(intent.robots)}, the actions are asked for {', '.join(robots)}")
            states = [check_state(observation.state, robot) for observation, robot in zip(observations, known, strict=True)]
            seen = intent.rows
        count = seen.mask.shape[0]
        committed = None if left is None else self._committed(left, delay, states, known, count)
        arguments = self._robots(states, known, count), np.uint32(seed), committed
        options = {"first": np.int32(first), "samples": samples, "steps": steps or self.policy.config.objective.steps}
        with meshes.use(self.mesh):
            if isinstance(seen, IntentRows):
                made = denoise(self.policy, seen, *arguments, **options)
            else:
                made = act(self.backbone, self.policy, seen, *arguments, **options)
        made = np.asarray(made).reshape(count, samples, *made.shape[1:])
        chunks = [self._decode(chunk, state, robot) for chunk, state, robot in zip(made, states, known, strict=False)]
        if left is not None:
            # They are executed whatever the model makes of them, in dimensions that never move by its statistics too.
            chunks = [np.concatenate([old[:, :delay], new[:, delay:]], axis=1) for old, new in zip(left, chunks, strict=True)]
        return chunks

    def _find(self, observations: Sequence[Observation], robots: Sequence[str]) -> list[Robot]:
        if not robots or len(robots) != len(observations):
            raise RequestError(f"there are {len(observations)} observations of {len(robots)} robots: give as many, at least one")
        return [self.files.find(name) for name in robots]

    def _prompts(self, observations: Sequence[Observation], robots: Sequence[Robot]) -> Prompts:
        instruction = self.policy.config.instruction
        examples = [encode(one, robot, self.engine, instruction) for one, robot in zip(observations, robots, strict=True)]
        shards = meshes.batch_shards(self.mesh)
        length = bucket(max(len(example.tokens) for example in examples))
        rows = [*examples, *[None] * (-len(examples) % shards)]
        return meshes.put(prompts_of(rows, self.engine.config, instruction, length, row_multiple=shards), self.mesh)

    def _robots(self, states: Sequence[np.ndarray], robots: Sequence[Robot], rows: int) -> RobotRows:
        config = self.policy.config
        widths = config.embodiment.state_width, config.embodiment.action_width
        index = np.zeros(rows, np.int32)
        encoded = np.zeros((rows, widths[0]), np.float32)
        state_masks = np.zeros((rows, widths[0]), bool)
        action_masks = np.zeros((rows, config.horizon, widths[1]), bool)
        for i, (state, robot) in enumerate(zip(states, robots, strict=True)):
            index[i] = config.robots.index(robot.name)
            encoded[i] = pad(encode_state(state, self.files.statistics[robot.name]), widths[0])
            state_masks[i] = state_mask(robot, widths[0])
            action_masks[i] = action_mask(robot, config.horizon, widths[1])
        return meshes.put(RobotRows(index, encoded, state_masks, action_masks), self.mesh)

    def _committed(
        self, left: Sequence[np.ndarray], delay: int, states: Sequence[np.ndarray], robots: Sequence[Robot], rows: int
    ) -> Committed:
        """As the model reads it: relative to the states of now."""
        config = self.policy.config
        samples, overlap = left[0].shape[:2]
        actions = np.zeros((rows, samples, config.horizon, config.embodiment.action_width), np.float32)
        for i, (chunk, state, robot) in enumerate(zip(left, states, robots, strict=True)):
            actions[i, :, :overlap, : chunk.shape[-1]] = encode_actions(chunk, state, self.files.statistics[robot.name], robot)
        actions = meshes.put(actions.reshape(rows * samples, *actions.shape[2:]), self.mesh)
        return Committed(actions, np.int32(delay), np.int32(overlap))  # pyright: ignore[reportArgumentType]

    def _decode(self, chunk: np.ndarray, state: np.ndarray, robot: Robot) -> np.ndarray:
        kept = chunk[:, : robot.horizon, : len(robot.action)]
        return decode_actions(kept, state, self.files.statistics[robot.name], robot)


def load_actor(
    path: str,
    mesh: Mesh | None = None,
    compute: ComputeConfig | None = None,
    engine: PromptEngine | None = None,
    backbone: str | None = None,
) -> Actor:
    """The policy of a MODEL and the first k blocks of its backbone: nothing above them is read."""
    compute = compute or ComputeConfig()
    files, engine = read_policy(path), engine or open_engine(path)
    below = load_below(path, files.config, mesh, compute, backbone)
    return Actor(below, load_policy(path, files, mesh, compute), files, engine, mesh)


def load_below(path: str, policy: PolicyConfig, mesh: Mesh | None, compute: ComputeConfig, backbone: str | None = None) -> Mllm:
    """Of a MODEL's backbone, the blocks that make the intent."""
    config = read_config(path)
    check_backbone(policy, config)
    below = below_block(config, policy)
    if mesh is not None:
        meshes.check(below, mesh)
    return with_params(below, compute, load_params(path, abstract_params(below, jnp.dtype(compute.dtype), mesh), backbone))


def load_policy(path: str, files: PolicyFiles, mesh: Mesh | None, compute: ComputeConfig) -> Policy:
    abstract = abstract_policy(files.config, jnp.dtype(compute.dtype), mesh)
    return policy_with_params(files.config, compute, load_policy_params(path, abstract))


@partial(jax.jit, static_argnames="blocks")
def look(backbone: Mllm, prompts: Prompts, blocks: int) -> IntentRows:
    return backbone.intent(prompts, blocks)


@partial(jax.jit, static_argnames=("samples", "steps"))
def denoise(
    policy: Policy,
    intent: IntentRows,
    robots: RobotRows,
    seed: jax.Array,
    committed: Committed | None,
    *,
    first: jax.Array | int = 0,
    samples: int,
    steps: int,
) -> jax.Array:
    condition = policy.condition(intent, robots)
    noise = noise_of(seed, intent.mask.shape[0], samples, policy.config, first)
    actions = sample(policy, condition, noise, steps, committed, guided=policy.config.objective.prefix == 0)
    return meshes.constrain(actions, (None, None, None))


@partial(jax.jit, static_argnames=("samples", "steps"))
def act(
    backbone: Mllm,
    policy: Policy,
    prompts: Prompts,
    robots: RobotRows,
    seed: jax.Array,
    committed: Committed | None,
    *,
    first: jax.Array | int = 0,
    samples: int,
    steps: int,
) -> jax.Array:
    """Both in one program."""
    intent = backbone.intent(prompts, policy.config.intent_block)
    return denoise(policy, intent, robots, seed, committed, first=first, samples=samples, steps=steps)


def noise_of(seed: jax.Array | int, rows: int, samples: int, config: PolicyConfig, first: jax.Array | int = 0) -> jax.Array:
    """[rows * samples, horizon, action_width]: decided by the seed, the row, counted from `first`, and the sample; never by the mesh."""
    return noise_of_rows(seed, first + jnp.arange(rows), samples, config)


def noise_of_rows(seed: jax.Array | int, numbers: jax.Array, samples: int, config: PolicyConfig) -> jax.Array:
    """The same of rows with these numbers."""
    shape = (config.horizon, config.embodiment.action_width)

    def draw(row: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), number), shape)

    drawn = jax.vmap(lambda row: jax.vmap(lambda number: draw(row, number))(jnp.arange(samples)))(numbers)
    return drawn.reshape(-1, *shape)
