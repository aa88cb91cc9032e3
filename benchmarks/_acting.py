"""The two sides of acting: this project, and the PyTorch module that an export holds with transformers' backbone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from _harness import Run
from _sides import Phase, Transformers, examples_of, timed

from blm_jax.batch import Prompts, RobotRows
from blm_jax.config import BackboneConfig, ComputeConfig, Dtype, PolicyConfig
from blm_jax.convert.twin.blm_policy import BLMPolicy, Committed, Intent
from blm_jax.data.demos.observation import prompts_of
from blm_jax.data.demos.robots import action_mask, find_robot, load_robots, state_mask
from blm_jax.data.prompt import Example
from blm_jax.infer.act import act, denoise, look, noise_of
from blm_jax.models import objective
from blm_jax.models.mllm import random_params, with_params
from blm_jax.models.policy import policy_with_params, random_policy
from blm_jax.weights.policy import PolicyFiles, write_policy

DELAY, LEFT = 3, 10  # of a chunk, where the last one is gone on with


@dataclass(frozen=True)
class Case:
    observations: int
    samples: int = 1
    intents: bool = False  # begins with these, and not with pictures and words
    going_on: Literal["", "guided", "given"] = ""  # with the last chunk: real-time chunking, and how

    @property
    def title(self) -> str:
        many = f"{self.observations} observation{'s' * (self.observations > 1)}"
        samples = f", {self.samples} samples each" if self.samples > 1 else ""
        how = {"": "", "guided": ", guided by the last chunk", "given": ", given the last chunk's steps"}[self.going_on]
        return f"{many}{samples}{', from intents' if self.intents else ''}{how}"


@dataclass(frozen=True)
class Sizes:
    """Of a model and of what it sees."""

    backbone: BackboneConfig  # no deeper than the intent
    policy: PolicyConfig
    cameras: int
    patches: int  # along each side of a picture
    words: int

    @property
    def length(self) -> int:
        """Tokens of an observation."""
        return self.cameras * ((self.patches // self.backbone.vision.merge) ** 2 + 2) + self.words

    def pictures(self, observations: int) -> tuple[tuple[int, int], ...]:
        return ((self.patches, self.patches),) * (self.cameras * observations)

    def examples(self, observations: int) -> list[Example]:
        examples = examples_of(Phase("prefill", observations, self.length, self.pictures(observations)), self.backbone)
        return [replace(example, supervised=np.zeros_like(example.supervised)) for example in examples]  # a prompt and no answer

    def robots(self, observations: int) -> RobotRows:
        """Robots in turn, their states at random."""
        known = load_robots()
        names = [self.policy.robots[i % len(self.policy.robots)] for i in range(observations)]
        width = self.policy.embodiment
        states = np.stack([state_mask(known[name], width.state_width) for name in names])
        return RobotRows(
            np.array([self.policy.robots.index(name) for name in names], np.int32),
            np.where(states, np.random.default_rng(1).standard_normal(states.shape), 0).astype(np.float32),
            states,
            np.stack([action_mask(known[name], self.policy.horizon, width.action_width) for name in names]),
        )

    def last_chunk(self, case: Case) -> np.ndarray | None:
        if not case.going_on:
            return None
        rows = case.observations * case.samples
        shape = rows, self.policy.horizon, self.policy.embodiment.action_width
        return np.random.default_rng(2).normal(0, 0.5, shape).astype(np.float32)


class Ours:
    name = "blm_jax"

    def __init__(self, sizes: Sizes, dtype: Dtype, backbone: dict[str, Any] | None = None, policy: dict[str, Any] | None = None):
        """Parameters on the host, or random ones made on the device."""
        self.sizes = sizes
        self.compute = ComputeConfig(dtype=dtype)
        kind = jnp.dtype(dtype)
        params = random_params(sizes.backbone, kind, None, 0) if backbone is None else jax.tree.map(jnp.asarray, backbone)
        self.backbone = with_params(sizes.backbone, self.compute, params)
        params = random_policy(sizes.policy, seed=0) if policy is None else policy
        self.policy_params = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), params)

    def runs(self, case: Case) -> dict[str, Run]:
        prompts, robots = self._prompts(case.observations), jax.tree.map(jnp.asarray, self.sizes.robots(case.observations))
        policy = policy_with_params(self._config(case), self.compute, self.policy_params)
        options = {"samples": case.samples, "steps": self.sizes.policy.objective.steps}
        last, committed = self.sizes.last_chunk(case), None
        if last is not None:
            committed = objective.Committed(jnp.asarray(last), jnp.int32(DELAY), jnp.int32(LEFT))
        rest = robots, np.uint32(0), committed
        if case.intents:
            intent = look(self.backbone, prompts, self.sizes.policy.intent_block)
            return {self.name: partial(timed, lambda: (denoise(policy, intent, *rest, **options),))}
        return {self.name: partial(timed, lambda: (act(self.backbone, policy, prompts, *rest, **options),))}

    def _prompts(self, observations: int) -> Prompts:
        examples = self.sizes.examples(observations)
        return jax.tree.map(jnp.asarray, prompts_of(examples, self.sizes.backbone, self.sizes.policy.instruction, self.sizes.length))

    def _config(self, case: Case) -> PolicyConfig:
        """A policy is given the last chunk's steps if it was trained so. No weight depends on it."""
        trained = replace(self.sizes.policy.objective, prefix=DELAY if case.going_on == "given" else 0)
        return replace(self.sizes.policy, objective=trained)


class Twin:
    name = "PyTorch"

    def __init__(self, sizes: Sizes, dtype: Dtype, device: str, policy: dict[str, Any] | None = None, *, compiled: bool = False):
        import torch

        self.torch = torch
        self.sizes = sizes
        self.name = f"{Twin.name}, {'compiled' if compiled else 'eager'}"
        self.side = Transformers(sizes.backbone, dtype, device)
        self.policy = exported(
            sizes.policy, random_policy(sizes.policy, seed=0) if policy is None else policy, device, getattr(torch, dtype)
        )
        self.compiled = compiled
        self.condition: Callable[..., Any] = self.policy.condition
        self.denoise: Callable[..., Any] = self.policy.denoise

    def runs(self, case: Case) -> dict[str, Run]:
        if self.compiled:
            self._compile()
        return {self.name: partial(self._run, *self._prepare(case), guided=case.going_on != "given")}

    def _compile(self) -> None:
        """Anew for each case: with what it has seen before, PyTorch would compile for shapes of any size, which is slower."""
        self.torch.compiler.reset()
        model = self.side.model.model
        for layer in (*model.visual.blocks, *model.language_model.layers):
            layer.compile(dynamic=False)
        self.condition = self.torch.compile(self.policy.condition, dynamic=False)
        self.denoise = self.torch.compile(self.policy.denoise, dynamic=False)

    def _prepare(self, case: Case) -> tuple[Any, ...]:
        """Inputs on the device: prompts or an intent, robots, noise, the last chunk."""
        tensor = self._tensor
        seen: Any = self.side.inputs(self.sizes.examples(case.observations))
        if case.intents:
            seen = self.policy.intent(self.side.model, seen)
        robots = self.sizes.robots(case.observations)
        rows = [tensor(part) for part in (robots.robot.astype(np.int64), robots.state, robots.state_mask, robots.action_mask)]
        noise = tensor(noise_of(0, case.observations, case.samples, self.sizes.policy))
        last = self.sizes.last_chunk(case)
        return seen, rows, noise, None if last is None else Committed(tensor(last), tensor(DELAY), tensor(LEFT))

    def _tensor(self, values: Any) -> Any:
        return self.torch.tensor(np.asarray(values)).to(self.side.device)

    def _run(self, seen: Any, rows: list[Any], noise: Any, committed: Any, *, guided: bool) -> tuple[float, np.ndarray]:
        with self.torch.no_grad():
            start = self.side.clock()
            intent = seen if isinstance(seen, Intent) else self.policy.intent(self.side.model, seen)
            condition = self.condition(intent, *rows)
            made = self.denoise(condition, noise, self.sizes.policy.objective.steps, committed, guided=guided)
            seconds = self.side.clock() - start
        return seconds, made.float().cpu().numpy()


def exported(config: PolicyConfig, params: dict[str, Any], device: str, dtype: Any) -> BLMPolicy:
    """As a deployer gets it: written into a directory, and loaded by the module without JAX."""
    known = load_robots()
    files = PolicyFiles(config, {name: find_robot(name, known) for name in config.robots}, {}, "")
    with tempfile.TemporaryDirectory() as directory:
        write_policy(Path(directory) / "policy", files, params)
        return BLMPolicy.from_pretrained(Path(directory) / "policy", device, dtype)


def lively_policy(config: PolicyConfig) -> dict[str, Any]:
    """Random parameters far from those before training, under which a policy says next to nothing."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.05 * random.standard_normal(leaf.shape, np.float32), random_policy(config, seed=0)
    )
