"""What is a robot's own: encoders of state and action, and the decoder of actions. Robots are rows of each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blm_jax.config import EmbodimentConfig, PolicyConfig
from blm_jax.models.layers import param, sinusoid


class GroupedLinear(nnx.Module):
    """A product in which each row of x has its robot's weights.

    x is laid into its robot's stretch of a row as long as all robots' inputs, zeros elsewhere: one plain product, in which no
    weight is copied for a row of the batch. Inputs are narrow beside the transformer's, so the zeros cost little.
    """

    def __init__(self, robots: int, inputs: int, outputs: int, *, scale: float | np.ndarray = 1.0, rngs: nnx.Rngs):
        """`scale`: of what comes out at first, beside what goes in; [inputs, 1] where inputs differ."""
        self.kernel = param(scale * inputs**-0.5 * jax.random.normal(rngs.params(), (robots, inputs, outputs)), ("robots", None, "embed"))
        self.bias = param(jnp.zeros((robots, outputs)), ("robots", "embed"))

    def __call__(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [rows, tokens, inputs], chosen [rows, robots] one-hot -> [rows, tokens, outputs]."""
        robots, inputs, outputs = self.kernel.shape
        rows, tokens, _ = x.shape
        laid = (x[:, :, None] * chosen[:, None, :, None].astype(x.dtype)).reshape(rows * tokens, robots * inputs)
        y = laid @ self.kernel[...].reshape(robots * inputs, outputs).astype(x.dtype)
        bias = jnp.matmul(chosen, self.bias[...], precision=jax.lax.Precision.HIGHEST)  # a choice, and no rounding
        return y.reshape(rows, tokens, outputs) + bias.astype(x.dtype)[:, None]


class Embodiments(nnx.Module):
    def __init__(self, robots: int, config: EmbodimentConfig, width: int, *, rngs: nnx.Rngs):
        self.robots = robots
        self.width = width
        self.patch = config.patch
        held = config.patch * config.action_width

        def linear(inputs: int, outputs: int, scale: float | np.ndarray = 1.0) -> GroupedLinear:
            return GroupedLinear(robots, inputs, outputs, scale=scale, rngs=rngs)

        self.state_inner, self.state_outer = linear(config.state_width, config.hidden), linear(config.hidden, width)
        self.action_inner = linear(held, width)
        # Time is silent at first, as in the DiT, and chunks are near their mean: what random weights say where no demonstration was stays.
        self.action_timed = linear(2 * width, width, scale=np.repeat(np.array([1, 0], np.float32), width)[:, None])
        self.action_outer = linear(width, width)
        self.decode_inner, self.decode_outer = linear(width, config.hidden), linear(config.hidden, held, scale=0.1)

    def choose(self, robot: jax.Array) -> jax.Array:
        """robot [rows] -> [rows, robots], float32."""
        return jax.nn.one_hot(robot, self.robots)

    def encode_state(self, state: jax.Array, chosen: jax.Array) -> jax.Array:
        """state [rows, state_width] -> [rows, 1, width]."""
        return self.state_outer(jax.nn.relu(self.state_inner(state[:, None], chosen)), chosen)

    def encode_actions(self, actions: jax.Array, time: jax.Array, chosen: jax.Array) -> jax.Array:
        """actions [rows, horizon, action_width], time [rows or 1, tokens] of each token -> [rows, tokens, width]."""
        rows, horizon, width = actions.shape
        embedded = self.action_inner(actions.reshape(rows, horizon // self.patch, self.patch * width), chosen)
        waves = jnp.broadcast_to(sinusoid(time, self.width, longest=1e4).astype(embedded.dtype), embedded.shape)
        timed = self.action_timed(jnp.concatenate([embedded, waves], axis=-1), chosen)
        return self.action_outer(jax.nn.silu(timed), chosen)

    def decode_actions(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [rows, tokens, width] -> [rows, horizon, action_width]."""
        made = self.decode_outer(jax.nn.relu(self.decode_inner(x, chosen)), chosen)
        return made.reshape(made.shape[0], made.shape[1] * self.patch, -1)


# --- rows of a policy's parameters -----------------------------------------------------------------------------------------


def robot_rows(params: Mapping[str, Any], robot: int) -> dict[str, Any]:
    """Which of a policy's parameters are one robot's own: a tree like `params` of bool that broadcast to the leaves.

    To train nothing else, put zeros for all other *updates*: of gradients alone, weight decay and momentum would not know.
    """
    count = params["embodiments"]["state_inner"]["bias"].shape[0]
    if not 0 <= robot < count:
        raise ValueError(f"there is no row {robot}: the policy has {count} robots")

    def mark(leaf: Any, own: bool) -> np.ndarray:
        rows = np.arange(count) == robot if own else np.zeros(1, bool)
        return rows.reshape(-1, *[1] * (leaf.ndim - 1))

    return {name: jax.tree.map(lambda leaf, own=name == "embodiments": mark(leaf, own), part) for name, part in params.items()}


def add_robot(params: Mapping[str, Any], config: PolicyConfig, *, seed: int = 0) -> dict[str, Any]:
    """A policy's parameters with a row for one robot more, the last, as it is before any training. `config` is that of `params`."""
    count = len(config.robots)
    old = params["embodiments"]

    def grow(old: dict[str, Any]) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.key(seed), count)  # two robots that are added begin differently
        fresh = nnx.to_pure_dict(nnx.state(Embodiments(1, config.embodiment, config.dit.width, rngs=nnx.Rngs(key)), nnx.Param))
        return jax.tree.map(lambda rows, row: jnp.concatenate([rows, row.astype(rows.dtype)]), old, fresh)

    # Robots are divided over no axis of a mesh, so a table with another row lies as it did.
    return {**params, "embodiments": jax.jit(grow, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, old))(old)}
