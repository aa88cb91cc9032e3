"""The pieces every tower is built of, and how layers of one kind are stacked and scanned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from blm_jax.config import Remat
from blm_jax.mesh import GATHERED, Axes, divided, param_sharding, unrolled, whole

WORD_SCALE = 0.02  # the standard deviation of words at first, as Qwen2.5-VL's configuration names it
TOKEN_SCALE = 0.5  # of learned tokens and places: about as large as what they stand beside or are added to

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


def param(value: jax.Array, axes: Axes) -> nnx.Param:
    """A parameter with logical axes. The key is ours: flax would read its own as axes of the mesh in use."""
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """A product over the last axes of x. Kernels keep heads apart, so that heads, not columns, are divided over a mesh."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], axes: Axes, *, bias: bool, scale: float = 1.0, rngs: nnx.Rngs):
        shape = (*inputs, *outputs)
        self.inputs = len(inputs)
        # What comes out is as large as what goes in, at any width: a small policy learns several times faster than from one fixed scale.
        self.kernel = param(scale * math.prod(inputs) ** -0.5 * jax.random.normal(rngs.params(), shape), axes)
        self.bias = param(jnp.zeros(outputs), axes[len(inputs) :]) if bias else None
        self.adapter: Adapter | None = nnx.data(None)  # or one that is put there later would be no parameter

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        lead = x.shape[: x.ndim - self.inputs]
        # Batch and length are folded: the plain product is the fastest form, backward above all. The kernel is left as it is:
        # folding heads into columns would hide from the compiler how they are divided.
        x = x.reshape(-1, *kernel.shape[: self.inputs])
        y = jnp.tensordot(x, kernel.astype(x.dtype), self.inputs)
        if self.adapter is not None:
            y = y + self.adapter(x)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y.reshape(*lead, *y.shape[1:])


class Adapter(nnx.Module):
    """What a product of low rank adds to another (LoRA, Hu et al. 2021). It adds nothing before it is trained."""

    def __init__(self, linear: Linear, rank: int, alpha: float, *, rngs: nnx.Rngs):
        shape, axes, count = linear.kernel.shape, linear.kernel.axes, linear.inputs
        stacked = int(axes[0] == "layers")
        at = stacked + count
        bound = math.prod(shape[stacked:at]) ** -0.5  # as peft begins
        down = jax.random.uniform(rngs.params(), (*shape[:at], rank), minval=-bound, maxval=bound)
        self.scale = alpha / rank
        self.inputs = count
        self.down = param(down, (*axes[:at], None))
        self.up = param(jnp.zeros((*shape[:stacked], rank, *shape[at:])), (*axes[:stacked], None, *axes[at:]))

    def __call__(self, x: jax.Array) -> jax.Array:
        small = jnp.tensordot(x, self.down[...].astype(x.dtype), self.inputs)
        return jnp.tensordot(small, self.up[...].astype(x.dtype), 1) * self.scale


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = param(jnp.ones(width), ("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Where it does not normalise, its scale and bias remain: the tree of parameters is the same either way."""

    def __init__(self, width: int, *, affine: bool = True, normalises: bool = True, eps: float = 1e-5):
        self.eps = eps
        self.normalises = normalises
        self.scale = param(jnp.ones(width), ("norm",)) if affine else None
        self.bias = param(jnp.zeros(width), ("norm",)) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.normalises:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
            wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            wide = wide * self.scale[...] + self.bias[...]
        return wide.astype(x.dtype)


def sinusoid(x: jax.Array, features: int, longest: float) -> jax.Array:
    """Waves of x, the longest of period 2 pi `longest`: [...] -> [..., features], cosines first."""
    frequencies = longest ** -(np.arange(features // 2, dtype=np.float32) / (features // 2))
    angles = x.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def swiglu(x: jax.Array, gate: Linear, up: Linear, down: Linear) -> jax.Array:
    return down(jax.nn.silu(gate(x)) * up(x))


def stack(make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """`count` layers as one module whose parameters have a leading axis "layers"."""
    stacked = nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)
    for _, variable in nnx.iter_graph(stacked):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layers", *variable.axes))
    return stacked


def unstack(layers: Layer | Sequence[Layer]) -> list[Layer]:
    """The layers of a stack one by one; a list of layers is one already."""
    if not isinstance(layers, nnx.Module) or isinstance(layers, nnx.List):
        return list(layers)
    graph, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(count)]


REMAT: dict[Remat, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),  # gathered weights are never kept: all layers' at once
    "full": None,  # keep nothing but the inputs of each layer
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan(
    body: Callable[..., tuple[Carry, Any]],
    carry: Carry,
    stacked: nnx.Module,
    *,
    xs: tuple[Any, ...] = (),
    remat: Remat = "none",
    begin: int = 0,
    blocks: int | None = None,
    gather: bool = True,
) -> tuple[Carry, Any]:
    """Run `body(carry, layer, *x)` over the layers of a stack, or from number `begin` of them up to number `blocks`, and no other.

    Splitting once and merging inside the body costs nothing; nnx.scan by default was several times slower a step. Where devices
    are apart, a layer's weights are gathered when its turn comes, but not if the layer is a stack itself (`gather` false).
    """
    graph, state = nnx.split(stacked)
    inputs = (state, xs)
    count = jax.tree.leaves(state)[0].shape[0]
    keep = count if blocks is None else blocks

    def step(carry: Carry, inputs: tuple[Any, tuple[Any, ...]]) -> tuple[Carry, Any]:
        layer, x = inputs
        return body(carry, nnx.merge(graph, _gathered(layer) if gather else layer), *x)

    if remat != "none" or (gather and any(_is_divided(leaf) for leaf in _variables(state))):
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    if begin == 0 and keep == count:
        return jax.lax.scan(step, carry, inputs, unroll=unrolled())

    # Fewer blocks: index the stack inside the loop, since a slice of it outside would be a copy of the weights.
    def indexed(carry: Carry, i: jax.Array) -> tuple[Carry, Any]:
        return step(carry, jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), inputs))

    return jax.lax.scan(indexed, carry, jnp.arange(begin, keep), unroll=unrolled())


def shapes_of(make: Callable[[], nnx.Module], dtype: DTypeLike, mesh: Mesh | None) -> dict[str, Any]:
    """The parameters `make` would make, as a nested dict of shapes with their shardings."""

    def leaf(param: nnx.Param) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else param_sharding(mesh, param.axes, param.shape)
        return jax.ShapeDtypeStruct(param.shape, dtype, sharding=sharding)

    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Param)))


def around(make: Callable[[], Layer], params: dict[str, Any]) -> Layer:
    """The module `make` would make, around parameters that exist already.

    Where devices are apart these are shards: what belongs to no stack is gathered here, layers of stacks when they run.
    """
    module = nnx.eval_shape(make)
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(divided=divided(variable.axes, variable.shape))
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, _gathered(state, stacks=False))


def _is_divided(variable: Any) -> bool:
    return variable.get_metadata().get("divided") is not None


def _variables(state: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)) if isinstance(leaf, nnx.Variable)]


def _gathered(state: Any, *, stacks: bool = True) -> Any:
    """With the weights whole that are divided; a dimension counts from the end, so it is the same for a layer and for its stack."""

    def one(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable) or not _is_divided(variable) or (not stacks and variable.axes[0] == "layers"):
            return variable
        return variable.replace(whole(variable[...], variable.divided))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
