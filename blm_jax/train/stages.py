"""What each stage makes small, as one device computes it of its own rows.

Both stages are the same to the step: `weigh` says what losses will be divided by, `loss` is these rows' share of the whole batch's
loss. Parameters come as a device's shards of a nested dict, and models gather them where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from blm_jax.batch import Batch, IntentRows, Moments, Prompts
from blm_jax.config import BackboneConfig, ComputeConfig, LoraConfig, PolicyConfig
from blm_jax.models.bridge import Bridge
from blm_jax.models.layers import around
from blm_jax.models.mllm import Mllm, with_params
from blm_jax.models.objective import follow, loss_weights, losses
from blm_jax.models.policy import policy_with_params
from blm_jax.train.loss import cross_entropy
from blm_jax.train.optimizer import SCALES
from blm_jax.train.select import Tree, joined
from blm_jax.weights.names import leaves, nested


class Share(NamedTuple):
    """A mean in two parts, so that rows anywhere can be added up; one value, or one a robot or task."""

    sum: jax.Array
    weight: jax.Array


Told = dict[str, Share]


class Stage(Protocol):
    def rows(self, batch: Any) -> int: ...
    def weigh(self, batch: Any, keys: jax.Array) -> tuple[jax.Array, ...]: ...
    def loss(
        self, trained: Tree, frozen: Tree, slow: Tree | None, batch: Any, keys: jax.Array, weights: tuple[jax.Array, ...], *, train: bool
    ) -> tuple[jax.Array, Told]: ...
    def follow(self, slow: Tree | None, trained: Tree) -> Tree | None: ...


def narrowed(params: Tree, dtype: str) -> Tree:
    """Matrices as products want them: cast before they are sent, not after."""
    return nested({path: leaf if path[-1] in SCALES else leaf.astype(dtype) for path, leaf in leaves(params)})


def _share(values: jax.Array, weights: jax.Array) -> Share:
    return Share(values.sum(), weights.sum())


def _shares(values: jax.Array, weights: jax.Array, kinds: jax.Array, count: int) -> Share:
    """Apart by kind; kind -1 is none."""
    chosen = jax.nn.one_hot(kinds.reshape(-1), count)
    return Share(values.reshape(-1) @ chosen, weights.reshape(-1) @ chosen)


@dataclass(frozen=True)
class StageOne:
    config: BackboneConfig
    compute: ComputeConfig
    lora: LoraConfig | None = None
    learns_head: bool = True
    corpora: int = 0  # whose losses are told apart
    kept: int = 0  # first blocks that nothing is learned of, nor of what lies below

    def rows(self, batch: Batch) -> int:
        return batch.tokens.shape[0]

    def weigh(self, batch: Batch, keys: jax.Array) -> tuple[jax.Array, ...]:
        return (batch.weights.sum(),)

    def loss(
        self,
        trained: Tree,
        frozen: Tree,
        slow: Tree | None,
        batch: Batch,
        keys: jax.Array,
        weights: tuple[jax.Array, ...],
        *,
        train: bool = True,
    ) -> tuple[jax.Array, Told]:
        params = narrowed(joined(trained, frozen), self.compute.dtype)
        model = with_params(self.config, self.compute, params, lora=self.lora)
        x = model.heard(own_groups(batch), kept=self.kept)
        flat, own = x.reshape(-1, x.shape[-1]), batch.weights.reshape(-1)
        kernel = model.decoder.head_kernel().astype(x.dtype)
        whole, each = cross_entropy(flat, kernel, batch.targets.reshape(-1), own / jnp.maximum(weights[0], 1.0), self.learns_head)
        each = jnp.where(own > 0, each * own, 0)
        told = {"loss": _share(each, own)}
        if batch.sources is not None:
            told["corpus"] = _shares(each, own, batch.sources, self.corpora)
        return whole, told

    def follow(self, slow: Tree | None, trained: Tree) -> None:
        return None


@dataclass(frozen=True)
class StageTwo:
    config: BackboneConfig | None  # None: intents are made already
    policy: PolicyConfig
    compute: ComputeConfig
    tasks: int = 0  # whose losses are told apart

    def rows(self, batch: Moments) -> int:
        return batch.has_future.shape[0]

    def weigh(self, batch: Moments, keys: jax.Array) -> tuple[jax.Array, ...]:
        return loss_weights(self.policy.objective, batch.chunks, batch.has_future, keys)

    def loss(
        self,
        trained: Tree,
        frozen: Tree,
        slow: Tree | None,
        batch: Moments,
        keys: jax.Array,
        weights: tuple[jax.Array, ...],
        *,
        train: bool = True,
    ) -> tuple[jax.Array, Told]:
        assert slow is not None
        own = joined(trained, frozen)
        policy = policy_with_params(self.policy, self.compute, narrowed(own["policy"], self.compute.dtype))
        target = self.bridge(slow)
        seen, future = self._look(own.get("backbone"), batch.seen), self._look(own.get("backbone"), batch.future)
        found = losses(policy, target, seen, batch.robots, batch.chunks, future, batch.has_future, keys, train=train)
        action = found.action.sum() / jnp.maximum(weights[0], 1)
        ahead = found.future.sum() / jnp.maximum(weights[1], 1)
        robot, robots = batch.robots.robot, len(self.policy.robots)
        told = {
            "action": _share(found.action, found.action_weight),
            "future": _share(found.future, found.future_weight),
            "action/robot": _shares(found.action, found.action_weight, robot, robots),
            "future/robot": _shares(found.future, found.future_weight, robot, robots),
        }
        if batch.task is not None:
            told["action/task"] = _shares(found.action, found.action_weight, batch.task, self.tasks)
        return action + self.policy.objective.future_weight * ahead, told

    def bridge(self, params: Tree) -> Bridge:
        policy, dtype = self.policy, self.compute.dtype
        return around(lambda: Bridge(policy.bridge, policy.intent_width, dtype, rngs=nnx.Rngs(0)), narrowed(params, dtype))

    def _look(self, backbone: Tree | None, what: Prompts | IntentRows) -> IntentRows:
        if isinstance(what, IntentRows):
            return what
        if backbone is None or self.config is None:
            raise ValueError("prompts are looked at by a backbone")
        model: Mllm = with_params(self.config, self.compute, backbone)
        prompts = replace(what, batch=own_groups(what.batch))
        return jax.lax.stop_gradient(model.intent(prompts, self.policy.intent_block))

    def follow(self, slow: Tree | None, trained: Tree) -> Tree | None:
        """Of a bridge that is frozen in part, the other part follows."""
        if slow is None:
            return None
        now = dict(leaves(trained["policy"].get("bridge", {})))
        decay = self.policy.objective.ema
        return nested({path: follow(leaf, now[path], decay) if path in now else leaf for path, leaf in leaves(slow)})


def own_groups(batch: Batch) -> Batch:
    """In training each row has its pictures to itself, so a part of the rows has a part of the groups."""
    if batch.vision is None:
        return batch
    return replace(batch, vision=replace(batch.vision, groups=batch.tokens.shape[0]))
