"""The mesh and the logical-axis rules: the only file that names physical axes."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
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
    if len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) > 1:
        return hybrid(sizes, devices)
    placed = sorted(devices, key=lambda device: getattr(device, "coords", ()))
    if sizes[AXES.index("fsdp")] == len(devices) and len(stages(placed)) > 1:
        # JAX would wind some of them up to a ring, whose sides are none of the grid's.
        return Mesh(np.array(placed).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def hybrid(sizes: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """Over several slices: the data axis goes across them, the others stay within one, where links are fast."""
    slices = len({device.slice_index for device in devices})
    if sizes[0] % slices:
        raise RequestError(f"mesh.data={sizes[0]} does not divide over {slices} slices: make it a multiple of {slices}")
    within = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, *[1] * len(within[1:])), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
    spec = RULES.spec(axes)
    return jax.lax.with_sharding_constraint(x, _part(spec, _AUTOMATIC) if _apart.get() else spec)


def per_device(function: Callable[..., jax.Array], inputs: Sequence[Axes], like: int) -> Callable[..., jax.Array]:
    """Run `function` on each device's own part of its inputs; the output is divided like input number `like`.

    For kernels that the compiler cannot divide by itself.
    """
    mesh = _current.get()
    if mesh is None:
        return function
    specs = tuple(RULES.spec(axes) for axes in inputs)
    if not _apart.get():
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[like], check_vma=False)
    specs = tuple(_part(spec, _AUTOMATIC) for spec in specs)  # rows are apart already
    return jax.shard_map(function, in_specs=specs, out_specs=specs[like], axis_names=set(_AUTOMATIC), check_vma=False)


# --- devices apart: a training step writes out what passes between them -----------------------------------------------------

_ROWS = RULES.table["batch"]
_AUTOMATIC = tuple(axis for axis in AXES if axis not in _ROWS)  # left to the compiler
GATHERED = "gathered weights"  # what remat finds them by
_apart: ContextVar[bool] = ContextVar("apart", default=False)


def _part(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """A spec less what it says of other axes."""
    parts = []
    for part in spec:
        kept = tuple(axis for axis in (part if isinstance(part, tuple) else (part,)) if axis in axes)
        parts.append(kept[0] if len(kept) == 1 else (kept or None))
    return PartitionSpec(*parts)


def by_rows() -> PartitionSpec:
    """Rows in front, divided over all devices that have rows of their own."""
    return RULES.spec(("batch",))


def copied() -> PartitionSpec:
    """The same everywhere."""
    return PartitionSpec()


def by_weight(leaf: Any) -> PartitionSpec:
    """What of a parameter's sharding is no matter of the compiler's while devices are apart."""
    return _part(leaf.sharding.spec, _ROWS)


def rows_apart(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` as one device runs it on its own rows; `inputs` and `outputs` are trees of specs.

    Weights come as the device's shard: `whole` gathers them where they are used, and the gradient of that scatters slopes back
    the way they came. So what is sent is what is written, once a use, and not what a compiler infers.
    """

    def local(*arguments: Any) -> Any:
        token = _apart.set(True)
        try:
            return function(*arguments)
        finally:
            _apart.reset(token)

    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=set(_ROWS), check_vma=False)


class Divided(NamedTuple):
    """How a parameter lies where devices are apart; dimensions count from the end, so they are a layer's and its stack's."""

    gathered: int  # the dimension that has to be gathered before the parameter is used
    automatic: int | None  # the dimension that the compiler divides


def divided(axes: Axes, shape: tuple[int, ...]) -> Divided | None:
    """None where a parameter is whole."""
    mesh = _current.get()
    if not _apart.get() or mesh is None or mesh.shape["fsdp"] == 1:
        return None
    spec = param_sharding(mesh, axes, shape).spec
    found = {part: i - len(shape) for i, part in enumerate(spec) if part is not None}
    return Divided(found["fsdp"], found.get("tensor")) if "fsdp" in found else None


def whole(shard: jax.Array, lies: Divided) -> jax.Array:
    """Gathered by rows of memory, whichever dimension it is: the TPU compiler scatters only such back, and sums up others whole.

    Where the compiler divides another dimension, this one is gathered for each of those parts: left to itself, it would join the
    parts first.
    """
    mesh = _current.get()
    at, beside = lies.gathered % shard.ndim, lies.automatic

    def gather(part: jax.Array) -> jax.Array:
        return jax.numpy.moveaxis(_joined(jax.numpy.moveaxis(part, at, 0)), 0, at)

    if beside is not None and mesh is not None and mesh.shape["tensor"] > 1:
        spec = PartitionSpec(*("tensor" if i == beside % shard.ndim else None for i in range(shard.ndim)))
        gather = jax.shard_map(gather, in_specs=spec, out_specs=spec, axis_names=set(_AUTOMATIC), check_vma=False)
    return checkpoint_name(gather(shard), GATHERED)


@jax.custom_vjp
def _joined(shard: jax.Array) -> jax.Array:
    return jax.lax.all_gather(shard, "fsdp", tiled=True)


def _scattered(_: None, slopes: jax.Array) -> tuple[jax.Array]:
    first, *others = slopes.shape
    if others and platform() == "tpu":
        # Else the compiler may leave them as the product wrote them, with the rows last in memory, and sum them up whole again.
        slopes = with_layout_constraint(slopes.reshape(first, -1), Layout((0, 1)))
    for groups in _one_side_at_a_time(_current.get()):
        slopes = jax.lax.psum_scatter(slopes, "fsdp", tiled=True, axis_index_groups=groups)
    return (slopes.reshape(-1, *others),)


_joined.defvjp(lambda shard: (_joined(shard), None), _scattered)


def _one_side_at_a_time(mesh: Mesh | None) -> list[list[list[int]] | None]:
    """Groups of shards that add up in turn: along one side of a grid the TPU compiler scatters, over several it sums up whole.

    What is sent is the same: each turn leaves to the next one only what is its own.
    """
    sizes = () if mesh is None else stages(list(mesh.devices[0, :, 0]))
    if len(sizes) < 2:
        return [None]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return [np.moveaxis(numbers, side, -1).reshape(-1, size).tolist() for side, size in enumerate(sizes)]


def stages(line: Sequence[Any]) -> tuple[int, ...]:
    """How devices in a row fill a grid of chips, its slowest side first; one number where they lie along one side, or fill none."""
    places = [device.coords if device.platform == "tpu" else () for device in line]
    for order in itertools.permutations(range(len(places[0]))):
        turned = [tuple(place[side] for side in order) for place in places]
        sizes = tuple(len(set(along)) for along in zip(*turned, strict=True))
        if turned == sorted(turned) and math.prod(sizes) == len(places):
            return tuple(size for size in sizes if size > 1)
    return (len(places),)


def unrolled() -> bool:
    """Whether layers are better no loop: a CPU runs what stands beside a loop at the same time, and mixes up what both send."""
    mesh = _current.get()
    return _apart.get() and mesh is not None and mesh.size > mesh.shape["data"] and platform() == "cpu"


def total(tree: Any) -> Any:
    """Summed over all rows of the batch."""
    return jax.lax.psum(tree, _ROWS)


def total_slopes(slopes: Any, specs: Any) -> Any:
    """Summed over the devices that share a shard of the weights; those that hold other shards were summed on the way back."""

    def one(slope: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.psum(slope, tuple(axis for axis in _ROWS if axis not in spec))

    return jax.tree.map(one, slopes, specs)


def param_sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives. A dimension that its fsdp axis does not divide stays whole: correct, and only small ones are odd."""
    parts = list(RULES.spec(axes))
    for i, part in enumerate(parts):
        if part == "fsdp" and shape[i] % mesh.shape["fsdp"]:
            parts[i] = None
    return NamedSharding(mesh, PartitionSpec(*parts))


def everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_one_number_a_row(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Where something lies that belongs to a parameter, but has size 1 along some of its dimensions."""
    parts = [None if size == 1 else part for size, part in zip(shape, [*sharding.spec, *[None] * len(shape)], strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def of_one_layer(stacked: Sharding) -> Sharding | None:
    """Where a layer lives once it is taken out of its stack: as before, less the first dimension. None on a single device."""
    if not isinstance(stacked, NamedSharding):
        return None
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are divided: rows of text and of vision are multiples of it."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in RULES.table["batch"]]))


def tensor_parts(mesh: Mesh) -> int:
    """Into how many parts heads are divided."""
    return mesh.shape["tensor"]


def rows_of_process(mesh: Mesh, count: int) -> list[int]:
    """Of a batch of so many rows, those that devices of this process hold."""
    places = NamedSharding(mesh, by_rows()).addressable_devices_indices_map((count,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(count))})


def put_rows(batch: Any, mesh: Mesh, own: Sequence[int], count: int) -> Any:
    """A batch of `count` rows of which this process holds its `own` alone. Leaves may have several rows for each of them."""
    sharding = NamedSharding(mesh, by_rows())
    place = {row: i for i, row in enumerate(own)}

    def leaf(x: np.ndarray) -> jax.Array:
        each = len(x) // len(own)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),))[0].indices(count * each)
            first = place[start // each] * each
            return x[first : first + stop - start]

        return jax.make_array_from_callback((count * each, *x.shape[1:]), sharding, part)

    return jax.tree.map(leaf, batch)


def put(batch: Any, mesh: Mesh | None) -> Any:
    """Host arrays with rows in front, to their devices. Every process holds the whole batch and gives its own rows."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    sharding = NamedSharding(mesh, RULES.spec(("batch",)))
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index, x=x: np.asarray(x)[index]), batch)


def serving(config: BackboneConfig, devices: int | None = None) -> MeshConfig:
    """The mesh for answering where none is asked for: weights stay where they are, divided by heads as far as that goes."""
    count = jax.device_count() if devices is None else devices
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
