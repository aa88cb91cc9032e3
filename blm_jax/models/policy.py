"""The policy: an intent and a robot's state in, the direction from noise to actions out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from blm_jax.batch import IntentRows, RobotRows
from blm_jax.config import ComputeConfig, PolicyConfig
from blm_jax.mesh import constrain
from blm_jax.models.bridge import Bridge
from blm_jax.models.dit import Clock, DiT
from blm_jax.models.embodiment import Embodiments
from blm_jax.models.layers import TOKEN_SCALE, LayerNorm, Linear, around, param, shapes_of
from blm_jax.models.transformer import Memory

TEXT_AXES = ("batch", "length", "width")


class Condition(NamedTuple):
    """All that an observation says to the denoiser, made once: for every step, and for every sample of noise."""

    memory: Memory  # [pairs, rows, heads, queries, head_dim]: the bridge's tokens as the DiT's cross-attention wants them
    state: jax.Array  # [rows, 1, width]
    chosen: jax.Array  # [rows, robots]
    mask: jax.Array  # [rows, horizon, action_width] bool


class Velocity(NamedTuple):
    actions: jax.Array  # [rows * samples, horizon, action_width] float32, zero where the robot has nothing
    future: jax.Array  # [rows * samples, queries, bridge width]: what the future tokens foresee


class FutureHead(nnx.Module):
    """From the DiT's future tokens, tapped, to the bridge's tokens of the future observation."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(inputs)
        self.inner = Linear([inputs], [outputs], ("embed", "ffn"), bias=True, rngs=rngs)
        self.outer = Linear([outputs], [outputs], ("ffn", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(jax.nn.gelu(self.inner(self.norm(x)), approximate=True))


class Policy(nnx.Module):
    def __init__(self, config: PolicyConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.compute = compute
        width, queries = config.dit.width, config.bridge.queries
        self.bridge = Bridge(config.bridge, config.intent_width, compute.dtype, rngs=rngs)
        self.dit = DiT(config.dit, config.bridge.width, config.objective.time_buckets, remat=compute.remat, rngs=rngs)
        self.embodiments = Embodiments(len(config.robots), config.embodiment, width, rngs=rngs)
        self.future_tokens = param(TOKEN_SCALE * jax.random.normal(rngs.params(), (queries, width)), (None, "embed"))
        self.action_places = param(TOKEN_SCALE * jax.random.normal(rngs.params(), (config.action_tokens, width)), (None, "embed"))
        self.future_head = FutureHead(width, config.bridge.width, rngs=rngs)

    def condition(self, intent: IntentRows, robots: RobotRows, hide_state: jax.Array | None = None) -> Condition:
        """`hide_state` [rows] bool: rows whose state is not shown, in training."""
        shown = robots.state_mask if hide_state is None else robots.state_mask & ~hide_state[:, None]
        chosen = self.embodiments.choose(robots.robot)
        # where and not a product: what stands in absent dimensions may be anything, NaN too.
        state = self.embodiments.encode_state(jnp.where(shown, robots.state, 0).astype(self.compute.dtype), chosen)
        return Condition(self.dit.remember(self.bridge(intent)), state, chosen, robots.action_mask)

    def velocity(
        self, condition: Condition, noised: jax.Array, time: jax.Array, given: jax.Array | None = None, keys: jax.Array | None = None
    ) -> Velocity:
        """noised [rows * samples, horizon, action_width], samples of a row following each other; time [rows * samples or 1].

        `given` [rows * samples or 1, horizon] bool: steps of the chunk that are known, and have time 1, if each is a token. `keys` turn
        dropout on.
        """
        samples = noised.shape[0] // condition.state.shape[0]
        state, chosen, mask = (jnp.repeat(x, samples, axis=0) for x in (condition.state, condition.chosen, condition.mask))
        queries, tokens = self.config.bridge.queries, self.config.action_tokens

        step_time = jnp.broadcast_to(time[:, None], (time.shape[0], tokens))
        times = time[:, None]
        which = jnp.zeros((1, 1 + queries + tokens), jnp.int32)
        if given is not None:
            step_time = jnp.where(given, 1.0, step_time)
            times = jnp.stack([time, jnp.ones_like(time)], axis=1)
            which = jnp.pad(given.astype(jnp.int32), ((0, 0), (1 + queries, 0)))
        clock = Clock(self.dit.time(times).astype(self.compute.dtype), which)

        actions = jnp.where(mask, noised, 0).astype(self.compute.dtype)
        actions = self.embodiments.encode_actions(actions, self._bucket(step_time), chosen) + self.action_places[...].astype(actions.dtype)
        future = jnp.broadcast_to(self.future_tokens[...].astype(actions.dtype), (actions.shape[0], queries, actions.shape[-1]))
        x = constrain(jnp.concatenate([state, future, actions], axis=1), TEXT_AXES)
        # Steps that a robot's chunk does not have are in a segment of their own, seen by none of the others.
        there = mask.reshape(mask.shape[0], tokens, -1).any(axis=-1)
        segments = jnp.pad(there.astype(jnp.int32), ((0, 0), (1 + queries, 0)), constant_values=1)
        x, tapped = self.dit(x, condition.memory, segments, clock, keys)
        made = self.embodiments.decode_actions(x[:, 1 + queries :], chosen).astype(jnp.float32)
        return Velocity(jnp.where(mask, made, 0), self.future_head(tapped[:, 1 : 1 + queries]))

    def _bucket(self, time: jax.Array) -> jax.Array:
        return jnp.floor(time * self.config.objective.time_buckets)


def abstract_policy(config: PolicyConfig, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> dict[str, Any]:
    """Shapes of all parameters as a nested dict, with their shardings on a mesh; nothing is computed."""
    return shapes_of(lambda: Policy(config, ComputeConfig(), rngs=nnx.Rngs(0)), dtype, mesh)


def policy_with_params(config: PolicyConfig, compute: ComputeConfig, params: dict[str, Any]) -> Policy:
    return around(lambda: Policy(config, compute, rngs=nnx.Rngs(0)), params)


def random_policy(config: PolicyConfig, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None, *, seed: int) -> dict[str, Any]:
    """Parameters as they are before any training, made where they live."""

    def make() -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.state(Policy(config, ComputeConfig(), rngs=nnx.Rngs(seed)), nnx.Param))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    shardings = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_policy(config, dtype, mesh))
    return jax.jit(make, out_shardings=shardings)()
