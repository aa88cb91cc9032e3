"""From observations to chunks of actions: the backbone up to block k, the bridge and the denoiser, in one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.batch import Batch, IntentRows, RobotRows
from blm_jax.config import ComputeConfig, PolicyConfig
from blm_jax.data.collate import collate
from blm_jax.data.observation import Observation, check, intent_tokens, messages_for
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.robots import Robot, action_mask, find_robot, pad, state_mask
from blm_jax.data.statistics import decode_actions, encode_state
from blm_jax.errors import RequestError
from blm_jax.infer.engine import open_engine
from blm_jax.infer.generate import bucket
from blm_jax.models.mllm import Mllm, abstract_params, with_params
from blm_jax.models.objective import sample
from blm_jax.models.policy import Policy, abstract_policy, policy_with_params
from blm_jax.weights.load import load_params
from blm_jax.weights.policy import PolicyFiles, load_policy_params, read_policy
from blm_jax.weights.source import read_config


class Actor:
    """A policy and as much of its backbone as it needs."""

    def __init__(self, backbone: Mllm, policy: Policy, files: PolicyFiles, engine: PromptEngine, mesh: Mesh | None):
        self.backbone = backbone
        self.policy = policy
        self.files = files
        self.engine = engine
        self.mesh = mesh

    def sample_actions(
        self, observations: Sequence[Observation], robots: Sequence[str], *, samples: int = 1, seed: int = 0, steps: int | None = None
    ) -> list[np.ndarray]:
        """Chunks in the robot's own units and limits, [samples, horizon, dims] for each observation; robots may differ."""
        known = [find_robot(name, self.files.robots) for name in robots]
        cameras = self.policy.config.bridge.cameras
        for robot in known:
            if len(robot.cameras) > cameras:
                raise RequestError(f"{robot.name} has {len(robot.cameras)} cameras, and the policy's bridge tells {cameras} apart")
        checked = [check(observation, robot) for observation, robot in zip(observations, known, strict=True)]
        batch, mask, places = self._prompts([self._encode(observation, robot) for observation, robot in zip(checked, known, strict=True)])
        rows = self._robots(checked, known, len(mask))
        steps = steps or self.policy.config.objective.steps
        with meshes.use(self.mesh):
            actions = _act(self.backbone, self.policy, batch, mask, places, rows, np.uint32(seed), samples=samples, steps=steps)
        chunks = np.asarray(actions).reshape(-1, samples, *actions.shape[1:])
        return [self._decode(chunk, one, robot) for chunk, one, robot in zip(chunks, checked, known, strict=False)]

    def _encode(self, observation: Observation, robot: Robot) -> Example:
        first = self.policy.config.instruction == "before"
        return self.engine.encode(messages_for(observation, robot, first), add_generation_prompt=True)

    def _prompts(self, examples: Sequence[Example]) -> tuple[Batch, np.ndarray, np.ndarray]:
        """The batch, and for each of its tokens whether it belongs to the intent, and where it was seen."""
        shards = meshes.batch_shards(self.mesh)
        rows = [[example] for example in examples] + [[] for _ in range(-len(examples) % shards)]
        length = bucket(max(len(example.tokens) for example in examples))
        batch = collate(rows, self.engine.config, length=length, row_multiple=shards)
        mask = np.zeros((len(rows), length), bool)
        places = np.zeros((len(rows), length, 4), np.int32)
        for i, example in enumerate(examples):
            n = len(example.tokens)
            mask[i, :n], places[i, :n] = intent_tokens(example, self.engine.config)
        return meshes.put(batch, self.mesh), meshes.put(mask, self.mesh), meshes.put(places, self.mesh)

    def _robots(self, observations: Sequence[Observation], robots: Sequence[Robot], rows: int) -> RobotRows:
        config = self.policy.config
        widths = config.embodiment.state_width, config.embodiment.action_width
        index = np.zeros(rows, np.int32)
        state = np.zeros((rows, widths[0]), np.float32)
        states = np.zeros((rows, widths[0]), bool)
        actions = np.zeros((rows, config.horizon, widths[1]), bool)
        for i, (observation, robot) in enumerate(zip(observations, robots, strict=True)):
            index[i] = config.robots.index(robot.name)
            state[i] = pad(encode_state(observation.state, self.files.statistics[robot.name]), widths[0])
            states[i] = state_mask(robot, widths[0])
            actions[i] = action_mask(robot, config.horizon, widths[1])
        return meshes.put(RobotRows(index, state, states, actions), self.mesh)

    def _decode(self, chunk: np.ndarray, observation: Observation, robot: Robot) -> np.ndarray:
        kept = chunk[:, : robot.horizon, : len(robot.action)]
        return decode_actions(kept, observation.state, self.files.statistics[robot.name], robot)


def load_actor(path: str, mesh: Mesh | None = None, compute: ComputeConfig | None = None, engine: PromptEngine | None = None) -> Actor:
    """The policy of a MODEL and the first k blocks of its backbone: nothing above them is read."""
    compute = compute or ComputeConfig()
    files, config = read_policy(path), read_config(path)
    decoder = replace(config.decoder, layers=files.config.intent_block, tied=True)  # tied: no head to read
    below = replace(config, decoder=decoder)
    if mesh is not None:
        meshes.check(below, mesh)
    engine = engine or open_engine(path)
    params = load_params(path, abstract_params(below, jnp.dtype(compute.dtype), mesh))
    return Actor(with_params(below, compute, params), load_policy(path, files, mesh, compute), files, engine, mesh)


def load_policy(path: str, files: PolicyFiles, mesh: Mesh | None, compute: ComputeConfig) -> Policy:
    abstract = abstract_policy(files.config, jnp.dtype(compute.dtype), mesh)
    return policy_with_params(files.config, compute, load_policy_params(path, abstract))


@partial(jax.jit, static_argnames=("samples", "steps"))
def _act(
    backbone: Mllm,
    policy: Policy,
    batch: Batch,
    mask: jax.Array,
    places: jax.Array,
    robots: RobotRows,
    seed: jax.Array,
    *,
    samples: int,
    steps: int,
) -> jax.Array:
    hidden = backbone.hidden(batch, policy.config.intent_block)
    condition = policy.condition(IntentRows(hidden, mask, places), robots)
    noise = noise_of(seed, mask.shape[0], samples, policy.config)
    actions = sample(policy, condition, noise, steps)
    return meshes.constrain(actions, (None, None, None))


def noise_of(seed: jax.Array | int, rows: int, samples: int, config: PolicyConfig) -> jax.Array:
    """[rows * samples, horizon, action_width]: decided by the seed, the row and the sample, never by the mesh or the batch."""
    shape = (config.horizon, config.embodiment.action_width)

    def draw(row: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), number), shape)

    drawn = jax.vmap(lambda row: jax.vmap(lambda number: draw(row, number))(jnp.arange(samples)))(jnp.arange(rows))
    return drawn.reshape(rows * samples, *shape)
