"""The mesh and the logical-axis rules: the only file that names physical axes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from blm_jax.batch import Batch, Chunks, IntentRows, Moments, Prompts, RobotRows, VisionRows
from blm_jax.config import BackboneConfig, MeshConfig
from blm_jax.errors import RequestError

AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]  # logical names, one a dimension


@dataclass(frozen=True)
class Rules:
    """Logical name -> mesh axes. One row a name; a name that is not here is a mistake, not a replicated dimension."""

    table: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, axes in self.table.items():
            unknown = set(axes) - set(AXES)
            if unknown or len(set(axes)) != len(axes):
                raise ValueError(f"rule {name}: {axes} must be different axes out of {AXES}")

    def spec(self, axes: Axes) -> PartitionSpec:
        used: dict[str, str] = {}
        parts = []
        for name in axes:
            if name is None:
                parts.append(None)
                continue
            if name not in self.table:
                raise ValueError(f"logical axis {name!r} has no rule; the rules know {sorted(self.table)}")
            physical = self.table[name]
            for axis in physical:
                if axis in used:
                    raise ValueError(f"logical axes {used[axis]!r} and {name!r} of {axes} both want mesh axis {axis!r}")
                used[axis] = name
            parts.append(physical[0] if len(physical) == 1 else (physical or None))
        return PartitionSpec(*parts)


RULES = Rules(
    {
        # weights
        "layers": (),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "ffn": ("tensor",),
        "vocab": ("tensor",),
        "norm": (),
        "robots": (),
        # activations
        "batch": ("data", "fsdp"),
        "length": (),
        "width": (),
    }
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    free = [i for i, size in enumerate(sizes) if size == -1]
    known = int(np.prod([size for size in sizes if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise RequestError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one of them -1")
    if free and known and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        shape = "x".join(str(size) for size in sizes)
        raise RequestError(
            f"mesh {shape} (data x fsdp x tensor) does not fit {len(devices)} devices: set mesh.* so that the product is {len(devices)}"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


jax.tree_util.register_dataclass(VisionRows, ["patches", "windows", "frames", "places"], ["groups", "levels"])
for _rows in (Batch, IntentRows, RobotRows, Chunks, Prompts, Moments):
    jax.tree_util.register_dataclass(_rows, [field.name for field in fields(_rows)], [])

_current: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Trace and run models on this mesh; None is one device, without annotations."""
    token = _current.set(mesh)
    try:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            yield
    finally:
        _current.reset(token)


def current() -> Mesh | None:
    return _current.get()


def platform() -> str:
    """Of the devices the program is for, which need not be those of this machine."""
    mesh = _current.get()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    if _current.get() is None:
        return x
    return jax.lax.with_sharding_constraint(x, RULES.spec(axes))


def per_device(function: Callable[..., jax.Array], inputs: Sequence[Axes], like: int) -> Callable[..., jax.Array]:
    """Run `function` on each device's own part of its inputs; the output is divided like input number `like`.

    For kernels that the compiler cannot divide by itself.
    """
    mesh = _current.get()
    if mesh is None:
        return function
    specs = tuple(RULES.spec(axes) for axes in inputs)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[like], check_vma=False)


def param_sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives. A dimension that its fsdp axis does not divide stays whole: correct, and only small ones are odd."""
    parts = list(RULES.spec(axes))
    for i, part in enumerate(parts):
        if part == "fsdp" and shape[i] % mesh.shape["fsdp"]:
            parts[i] = None
    return NamedSharding(mesh, PartitionSpec(*parts))


def of_one_layer(stacked: Sharding) -> Sharding | None:
    """Where a layer lives once it is taken out of its stack: as before, less the first dimension. None on a single device."""
    if not isinstance(stacked, NamedSharding):
        return None
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are divided: rows of text and of vision are multiples of it."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in RULES.table["batch"]]))


def put(batch: Any, mesh: Mesh | None) -> Any:
    """Host arrays with rows in front, to their devices. Every process holds the whole batch and gives its own rows."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = NamedSharding(mesh, RULES.spec(("batch",)))
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), batch)


def serving(config: BackboneConfig) -> MeshConfig:
    """The mesh for answering where none is asked for: weights stay where they are, divided by heads as far as that goes."""
    count = jax.device_count()
    tensor = int(np.gcd(count, np.gcd.reduce(list(_divided_by_tensor(config).values()))))
    return MeshConfig(data=count // tensor, fsdp=1, tensor=tensor)


def _divided_by_tensor(config: BackboneConfig) -> dict[str, int]:
    text, vision = config.decoder, config.vision
    return {
        "decoder heads": text.heads,
        "decoder key heads": text.kv_heads,
        "decoder ffn": text.ffn,
        "vocab": text.vocab,
        "vision heads": vision.heads,
        "vision ffn": vision.ffn,
        "merger width": vision.width * vision.merge**2,
    }


def check(config: BackboneConfig, mesh: Mesh) -> None:
    """Refuse a tensor axis that would cut through a head or a column of a feed-forward network."""
    tensor = mesh.shape["tensor"]
    divided = _divided_by_tensor(config)
    wrong = [f"{name} {size}" for name, size in divided.items() if size % tensor]
    if wrong:
        most = int(np.gcd.reduce(list(divided.values())))
        fits = [str(n) for n in range(1, most + 1) if most % n == 0]
        raise RequestError(
            f"mesh.tensor={tensor} does not divide {', '.join(wrong)}: take {' or '.join(fits)} and put the other devices on fsdp or data"
        )
