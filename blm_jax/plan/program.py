"""What a compiled program does, counted: products, kernels and what goes between devices, each as often as it runs. For one device.

Formulas count the work of the compiled program as it is, recomputation and padding included; `counts.py` counts what is asked for.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from blm_jax.plan.hlo import Computation, Instruction, Module, Shape, Visit
from blm_jax.plan.traffic import moved


class Groups(NamedTuple):
    """Which devices speak with each other, by what the mesh calls them."""

    size: int
    axes: tuple[str, ...]  # along which members of a group differ
    slices: bool  # they lie in several slices
    sides: tuple[int, ...] = ()  # axes of the chips' grid along which members of a group differ


class Collective(NamedTuple):
    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ...
    shapes: tuple[Shape, ...]  # of its result
    groups: Groups
    bytes: float  # that a device receives each time
    times: int
    waits: bool  # nothing is computed meanwhile
    origin: str

    @property
    def dtypes(self) -> str:
        return "+".join(sorted({shape.dtype for shape in self.shapes}))


class Kernel(NamedTuple):
    """A Pallas kernel; `operations` is None where no formula knows it."""

    name: str
    shapes: tuple[Shape, ...]  # of its operands
    operations: int | None
    times: int


@dataclass
class Counts:
    products: Counter[str] = field(default_factory=Counter)  # operations by the dtype that is multiplied
    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    traffic: int = 0  # bytes between the chip and its memory
    unknown: list[str] = field(default_factory=list)  # loops counted as one turn, as data decides how many they make

    @property
    def operations(self) -> int:
        return sum(self.products.values()) + sum((kernel.operations or 0) * kernel.times for kernel in self.kernels)


def count(text: str, mesh: Mesh) -> Counts:
    """Of a compiled program's text, made for the devices of this mesh."""
    module, counts = Module(text), Counts()
    chains: set[tuple[int, str, str]] = set()
    for visit in module.visits():
        instruction = visit.instruction
        opcode = instruction.opcode.removesuffix("-start")
        if not visit.fused:
            counts.traffic += visit.times * moved(instruction, visit.computation, module)
        if opcode in ("dot", "convolution"):
            left = visit.computation.shapes_of(instruction.operands[0])[0]
            counts.products[left.dtype] += visit.times * product_operations(instruction, visit.computation)
        elif instruction.attribute("custom_call_target") == '"tpu_custom_call"':
            shapes = tuple(shape for operand in instruction.operands for shape in visit.computation.shapes_of(operand))
            counts.kernels.append(Kernel(_kernel_name(instruction), shapes, kernel_operations(instruction, shapes), visit.times))
        elif opcode in _RECEIVED or opcode == "recv":
            # The compiler spreads a gather over several kernels, each of which shows it: they share its chain's number.
            chain = re.search(r'chain_id="(\d+)"', instruction.rest)
            if chain:
                key = (visit.region, opcode, chain[1])
                if key in chains:
                    continue
                chains.add(key)
            found = _between_slices(instruction, visit, mesh) if opcode == "recv" else _collective(instruction, visit, mesh)
            if found is not None and found.bytes:
                counts.collectives.append(found)
    counts.unknown = module.unknown
    return counts


# --- products ------------------------------------------------------------------------------------------------------------


def product_operations(of: Instruction, computation: Computation) -> int:
    left, right = (computation.shapes_of(operand)[0].dims for operand in of.operands[:2])
    if of.opcode == "dot":
        summed = math.prod(left[axis] for axis in _numbers(of.attribute("lhs_contracting_dims") or ""))
        return 2 * math.prod(of.shapes[0].dims) * summed
    return _convolution_operations(of, left, right)


def _convolution_operations(of: Instruction, left: Sequence[int], right: Sequence[int]) -> int:
    """TPU programs write products as convolutions, with padding that is never multiplied: only what meets a real value counts."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", of.attribute("dim_labels") or "")
    if labels is None:
        raise ValueError(f"{of.name} has no dim_labels")
    inputs, kernel, outputs = labels.groups()
    window = _window(of.attribute("window") or "{}")
    places = sorted(set(outputs) - set("bf"))
    met = 1
    for number, place in enumerate(places):
        pair = (left[inputs.index(place)], right[kernel.index(place)])
        met *= _meetings(*pair, of.shapes[0].dims[outputs.index(place)], {name: values[number] for name, values in window.items()})
    batch, features = (of.shapes[0].dims[outputs.index(label)] for label in "bf")
    return 2 * batch * features * right[kernel.index("i")] * met


def _window(text: str) -> dict[str, list[tuple[int, ...]]]:
    """window={size=3x16 pad=2_2x15_15 rhs_reversal=1x1}: by name, what each dimension has."""
    found = {}
    for name, values in re.findall(r"(\w+)=([\dx_-]+)", text):
        found[name] = [tuple(int(part) for part in value.split("_")) for value in values.split("x")]
    return found


def _meetings(inputs: int, kernel: int, outputs: int, window: Mapping[str, tuple[int, ...]]) -> int:
    """Of an input and a number of the kernel along one dimension, over all outputs."""
    stride, low = window.get("stride", (1,))[0], window.get("pad", (0, 0))[0]
    spread, apart = window.get("lhs_dilate", (1,))[0], window.get("rhs_dilate", (1,))[0]
    if (stride, spread, apart, low) == (1, 1, 1, 0) and outputs + kernel - 1 <= inputs:
        return outputs * kernel
    places = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * apart - low
    return int(np.sum((places >= 0) & (places < (inputs - 1) * spread + 1) & (places % spread == 0)))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# --- kernels -------------------------------------------------------------------------------------------------------------


def _kernel_name(of: Instruction) -> str:
    return next((part for part in reversed(of.origin.split("/")) if part not in ("pallas_call", "")), of.name.lstrip("%"))


# Products over the blocks a splash kernel visits, and which of its block sizes are theirs.
_SPLASH = {
    "splash_mha_fwd": (2, "block_q", "block_kv"),
    "splash_mqa_fwd": (2, "block_q", "block_kv"),
    "splash_mha_dq": (3, "block_q_dq", "block_kv_dq"),
    "splash_mqa_dq": (3, "block_q_dq", "block_kv_dq"),
    "splash_mha_dkv": (4, "block_q_dkv", "block_kv_dkv"),
    "splash_mqa_dkv": (4, "block_q_dkv", "block_kv_dkv"),
}


def kernel_operations(of: Instruction, operands: Sequence[Shape]) -> int | None:
    """Of a splash kernel, over the blocks it visits."""
    name = _kernel_name(of)
    known = next((value for key, value in _SPLASH.items() if name.startswith(key)), None)
    metadata = re.search(r'"xprof_metadata":("(?:[^"\\]|\\.)*")', of.rest)
    if known is None or metadata is None:
        return None
    products, query_block, key_block = known
    sizes = json.loads(json.loads(metadata[1]))
    if name.startswith(("splash_mha_dkv", "splash_mqa_dkv")) and sizes.get("use_fused_bwd_kernel"):
        products = 5
    queries, keys = [shape.dims for shape in operands if shape.dtype in ("bf16", "f32") and len(shape.dims) >= 3][:2]
    # Integers come in pairs, the segments of queries and of keys; a causal mask adds the places of the queries.
    causal = sum(shape.dtype == "s32" for shape in operands) % 2 == 1
    pairs = visited(queries[-2], keys[-2], sizes[query_block], sizes[key_block], causal)
    return products * 2 * math.prod(queries[:-2]) * pairs * queries[-1]


def visited(queries: int, keys: int, query_block: int, key_block: int, causal: bool) -> int:
    """Pairs of a query and a key in the blocks that are computed: with a causal mask those that the diagonal reaches."""
    if not causal:
        return queries * keys
    last = np.arange(query_block, queries + 1, query_block)  # one behind the last query of each block
    return int(np.sum(np.minimum(-(-last // key_block), keys // key_block))) * query_block * key_block


# --- between devices -----------------------------------------------------------------------------------------------------

# Bytes that a device receives, of the result's bytes and a group's size.
_RECEIVED = {
    "all-gather": lambda result, size: result * (size - 1) / size,
    "all-reduce": lambda result, size: 2 * result * (size - 1) / size,
    "reduce-scatter": lambda result, size: result * (size - 1),
    "all-to-all": lambda result, size: result * (size - 1) / size,
    "ragged-all-to-all": lambda result, size: result * (size - 1) / size,
    "collective-broadcast": lambda result, size: result,
    "collective-permute": lambda result, size: result,
}


def _collective(of: Instruction, visit: Visit, mesh: Mesh) -> Collective | None:
    kind = of.opcode.removesuffix("-start")
    pairs = of.attribute("source_target_pairs")
    groups = _groups(of, mesh.size) if pairs is None else [pair for pair in _inner(pairs) if pair[0] != pair[1]]
    if not groups:
        return None
    shapes = _results(of)
    if kind == "all-reduce" and "all-reduce-scatter" in visit.computation.name:
        kind = "reduce-scatter"  # one kernel: what it hands out is a part of the sum
        shapes = tuple(shape._replace(dims=(math.prod(shape.dims) // len(groups[0]),)) for shape in shapes)
    size = len(groups[0])
    received = sum(_RECEIVED[kind](shape.bytes, size) for shape in shapes)
    overlaps = of.opcode.endswith("-start") or "chain_id=" in of.rest or "async" in visit.computation.name
    return Collective(kind, shapes, _name(groups, mesh), received, visit.times, not overlaps, of.origin)


def _results(of: Instruction) -> tuple[Shape, ...]:
    """Less what a `-start` hands on of its operands, and its flags."""
    if not of.opcode.endswith("-start") or of.opcode == "all-reduce-start":
        return of.shapes
    many = len(of.operands)
    return of.shapes[many : 2 * many]


def _groups(of: Instruction, devices: int) -> list[list[int]]:
    """Written out, counted up in a shape that is turned and cut, or by axes of a mesh of the compiler's own."""
    rest = of.rest[of.rest.find("replica_groups=") :] if "replica_groups=" in of.rest else "replica_groups={}"
    if found := re.match(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _counted(found[2], found[3]).reshape(_numbers(found[1])).tolist()
    if found := re.match(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{((?:'\w+',?)+)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = re.findall(r"'(\w+)'", found[4])
        order = [list(sizes).index(name) for name in (*(name for name in sizes if name not in along), *along)]
        ids = _counted(found[2] or str(math.prod(sizes.values())), found[3])
        return ids.reshape(list(sizes.values())).transpose(order).reshape(-1, math.prod(sizes[name] for name in along)).tolist()
    if rest.startswith("replica_groups={"):
        return _inner(of.attribute("replica_groups") or "{}") or [list(range(devices))]
    raise ValueError(f"replica groups of {of.name} are written in an unknown way: {rest[:100]}")


def _counted(shape: str, order: str | None) -> np.ndarray:
    """Numbers counted up in a shape, which is turned then."""
    dims = _numbers(shape)
    return np.arange(math.prod(dims)).reshape(dims).transpose(_numbers(order) if order else range(len(dims)))


def _inner(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text)]


def _name(groups: Sequence[Sequence[int]], mesh: Mesh) -> Groups:
    places = [np.array(np.unravel_index(group, mesh.devices.shape)) for group in groups]  # [axes, members]
    differ = np.any([np.ptp(place, axis=1) > 0 for place in places], axis=0)
    flat = mesh.devices.flat
    slices = any(len({_slice(flat[member]) for member in group}) > 1 for group in groups)
    coordinates = [np.array([getattr(flat[member], "coords", (member,)) for member in group]) for group in groups]
    sides = np.any([np.ptp(place, axis=0) > 0 for place in coordinates], axis=0)
    axes = tuple(name for name, differs in zip(mesh.axis_names, differ, strict=True) if differs)
    return Groups(len(groups[0]), axes, slices, tuple(int(side) for side in np.flatnonzero(sides)))


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _between_slices(of: Instruction, visit: Visit, mesh: Mesh) -> Collective | None:
    """What the hosts of several slices exchange: the runtime adds up, so a device sends and receives only once."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', of.rest)
    if transfer is None:
        return None
    kind = transfer[1].lower().replace("_", "-")
    slices = len({_slice(device) for device in mesh.devices.flat})
    first = [next(i for i, device in enumerate(mesh.devices.flat) if _slice(device) == one) for one in _slice_numbers(mesh)]
    shape = of.shapes[0]
    received = _RECEIVED.get(kind, _RECEIVED["collective-permute"])(shape.bytes, slices)
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', of.rest)
    return Collective(kind, (shape,), _name([first], mesh), received, visit.times, False, name[1] if name else of.origin)


def _slice_numbers(mesh: Mesh) -> list[int]:
    return sorted({_slice(device) for device in mesh.devices.flat})


# --- faults --------------------------------------------------------------------------------------------------------------


_SMALL = ("scale", "bias")  # parameters whose sums are beneath notice


def faults(counts: Counts, parameters: Any) -> list[str]:
    """Weight gradients that are summed whole where each device keeps only its part: twice the bytes that are needed, or more.

    parameters: a tree of shapes with shardings.
    """
    whole: dict[tuple[int, ...], dict[str, set[str]]] = {}  # by shape: parameters, and the axes that divide them
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if str(getattr(path[-1], "key", "")) not in _SMALL and leaf.sharding is not None:
            axes = {axis for part in leaf.sharding.spec if part for axis in (part if isinstance(part, tuple) else (part,))}
            for dims in _whole_shapes(leaf):
                whole.setdefault(dims, {})[jax.tree_util.keystr(path, simple=True, separator=".")] = axes
    found = []
    for one in counts.collectives:
        if one.kind != "all-reduce":
            continue
        # Where devices that share no shard add up, each has its part of a slope already.
        alike = {
            shape: [name for name, axes in whole.get(_key(shape.dims), {}).items() if axes & set(one.groups.axes)] for shape in one.shapes
        }
        shapes = [shape for shape in one.shapes if alike[shape]]
        if shapes:
            told = ", ".join(f"{shape} (like {_some(alike[shape])})" for shape in dict.fromkeys(shapes))
            share = sum(shape.bytes for shape in shapes) / sum(shape.bytes for shape in one.shapes)
            sent = share * one.bytes * one.times / 1e9
            found.append(f"summed whole over {'+'.join(one.groups.axes)}, {one.times} times, {sent:.2f} GB a device: {told}")
    return found


def _some(names: Sequence[str]) -> str:
    return " or ".join(names[:3]) + (f" or {len(names) - 3} others" if len(names) > 3 else "")


def _whole_shapes(leaf: jax.ShapeDtypeStruct) -> set[tuple[int, ...]]:
    """Of a parameter or of one of its layers: its shape on a device with at least one divided dimension whole again."""
    if leaf.sharding is None:
        return set()
    part = leaf.sharding.shard_shape(leaf.shape)
    divided = [axis for axis, size in enumerate(leaf.shape) if part[axis] != size]
    found = set()
    for many in range(1, len(divided) + 1):
        for axes in itertools.combinations(divided, many):
            dims = tuple(leaf.shape[axis] if axis in axes else size for axis, size in enumerate(part))
            found |= {_key(dims)} if 0 in axes else {_key(dims), _key(dims[1:])}
    return {dims for dims in found if len(dims) > 1}


def _key(dims: Sequence[int]) -> tuple[int, ...]:
    """The compiler drops dimensions of one, and orders the others as it likes."""
    return tuple(sorted(size for size in dims if size > 1))
