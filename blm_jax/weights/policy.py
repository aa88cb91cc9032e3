"""The directory policy/ of a MODEL: a policy's weights, its contract with the robots, and the PyTorch module that runs it alone.

    MODEL/policy/model.safetensors   the weights, named as in the PyTorch module: layers numbered, matrices [out, in]
    MODEL/policy/blm_policy.py       the module, whole
    MODEL/policy/config.json         the contract, written last

It is the same in both forms of a MODEL. A training checkpoint of Stage II has the contract in assets/policy.json and the weights
below params/policy, as orbax has them; it is read as if it had a policy/.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path as LocalPath
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from blm_jax import configfile
from blm_jax.config import BackboneConfig, PolicyConfig
from blm_jax.configfile import suggest
from blm_jax.data.demos import robots as registry
from blm_jax.data.demos import statistics as numbers
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.statistics import Statistics
from blm_jax.data.files import one_line, open_path, read_json
from blm_jax.errors import RequestError, RunError
from blm_jax.weights.checkpoint import ASSETS, PARAMS, open_arrays
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.hub import TRAINED_CONTRACT
from blm_jax.weights.names import Entry, Path, Shape, Slices, Tensor, leaves, some
from blm_jax.weights.safetensors_file import CODES, PlannedFile, Stored, copy_cast, is_local, read_block, read_header
from blm_jax.weights.source import PathLike, read_config
from blm_jax.weights.trained import POLICY_PARAMS, check_values, is_trained, newest_of_run, open_contents

POLICY, WEIGHTS, CONTRACT = "policy", "model.safetensors", "config.json"
TWIN = LocalPath(__file__).parents[1] / "convert" / "twin" / "blm_policy.py"
FORMAT = 1
PLACE_VALUES = 3 * 64  # of row, column and time, that the bridge projects


# --- the contract ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyFiles:
    """What policy/config.json says."""

    config: PolicyConfig
    robots: dict[str, Robot]  # in the order of config.robots
    statistics: dict[str, Statistics]  # by robot; one that was never trained has none
    backbone: str  # fingerprint of the backbone it was trained on

    def __post_init__(self) -> None:
        config = self.config
        if tuple(self.robots) != config.robots:
            raise RequestError(f"the policy is of the robots {', '.join(config.robots)}, but described are {', '.join(self.robots)}")
        for robot in self.robots.values():
            registry.state_mask(robot, config.embodiment.state_width)
            registry.action_mask(robot, config.horizon, config.embodiment.action_width)
            if len(robot.cameras) > config.bridge.cameras:
                raise RequestError(f"robot {robot.name} has {len(robot.cameras)} cameras, more than bridge.cameras {config.bridge.cameras}")
        for name, statistics in self.statistics.items():
            numbers.check_statistics(statistics, registry.find_robot(name, self.robots))

    def find(self, name: str) -> Robot:
        """A robot that can be driven."""
        drives = ", ".join(self.statistics) or "no robot"
        if name not in self.robots:
            raise RequestError(f"the policy has no row for the robot {name!r}{suggest(name, self.robots)}; it drives {drives}")
        if name not in self.statistics:
            raise RequestError(f"the policy has a row for {name}, but was not trained for it: it drives {drives}")
        return self.robots[name]


def with_robot(files: PolicyFiles, robot: Robot, statistics: Statistics | None = None) -> PolicyFiles:
    """The contract of a policy with one robot more, the last: `models.embodiment.add_robot` makes its row of the weights."""
    config = replace(files.config, robots=(*files.config.robots, robot.name))
    known = {} if statistics is None else {robot.name: statistics}
    return PolicyFiles(config, {**files.robots, robot.name: robot}, {**files.statistics, **known}, files.backbone)


def check_backbone(policy: PolicyConfig, backbone: BackboneConfig) -> None:
    """Refuse a policy that was made for a backbone of another shape."""
    layers, width = backbone.decoder.layers, backbone.decoder.width
    if policy.intent_width != width or policy.intent_block > layers:
        raise RequestError(
            f"the policy reads block {policy.intent_block} of a backbone {policy.intent_width} wide, "
            f"but this one has {layers} blocks and is {width} wide: the policy is another backbone's"
        )


def read_policy(model_directory: PathLike) -> PolicyFiles:
    directory = newest_of_run(open_path(model_directory))
    path = _contract_path(directory)
    if not has_policy(directory):
        raise RequestError(f"{model_directory} has no {POLICY}/: it answers questions, but was not trained to act")
    if not path.exists():
        raise RequestError(f"{path} is missing: what wrote the policy was stopped; write it again")
    return _from_json(read_json(path), str(path))


def _contract_path(directory: epath.Path) -> epath.Path:
    return directory / ASSETS / TRAINED_CONTRACT if is_trained(directory) else directory / POLICY / CONTRACT


def contract(files: PolicyFiles) -> dict[str, Any]:
    """As config.json has it."""
    return {
        "format": FORMAT,
        "backbone": files.backbone,
        "policy": asdict(files.config),
        "robots": registry.to_json(files.robots),
        "statistics": {name: numbers.to_json(statistics) for name, statistics in files.statistics.items()},
    }


def _from_json(raw: Mapping[str, Any], source: str) -> PolicyFiles:
    if raw.get("format") != FORMAT:
        raise RequestError(f"{source}: its format is {raw.get('format')}, but this release reads {FORMAT}; export the policy again")
    known = ("format", "backbone", "policy", "robots", "statistics")
    for key in raw:
        if key not in known:
            raise RequestError(f"{source}: {key}: no such key{suggest(key, known)}")
    for key in known:
        if key not in raw:
            raise RequestError(f"{source} has no {key}; export the policy again")
    # A field left out would be read as today's default, and as another policy tomorrow.
    missing = _missing(raw["policy"], asdict(PolicyConfig()))
    if missing:
        raise RequestError(f"{source}: {some([f'policy.{name}' for name in missing])} missing; export the policy again")
    if not isinstance(raw["backbone"], str) or not isinstance(raw["statistics"], Mapping):
        raise RequestError(f"{source}: backbone must be text and statistics keys and values; export the policy again")
    config = configfile.parse(PolicyConfig, raw["policy"], source)
    robots = registry.from_json(raw["robots"], source)
    statistics = {name: numbers.from_json(value, source) for name, value in raw["statistics"].items()}
    try:
        return PolicyFiles(config, robots, statistics, raw["backbone"])
    except RequestError as error:
        raise RequestError(f"{source}: {error}") from None


def _missing(given: Any, wanted: Mapping[str, Any]) -> list[str]:
    if not isinstance(given, Mapping):
        return []  # of the wrong kind: parsing says so
    below = [f"{key}.{name}" for key, value in wanted.items() if isinstance(value, Mapping) for name in _missing(given.get(key), value)]
    return [key for key in wanted if key not in given] + below


# --- names -------------------------------------------------------------------------------------------------------------------


def table(config: PolicyConfig) -> dict[Path, Entry]:
    """Every array of a policy's parameter tree, and the tensors of the PyTorch module that it is made of.

    Names are those of the tree, but that layers are numbered and kernel and scale are called weight.
    """
    entries: dict[Path, Entry] = {}

    def add(name: str, leaf: str, kind: str, shape: Shape, rows: Shape, columns: Shape, layers: int | None, *, turned: bool = True) -> None:
        path = (*name.replace(".{}", "").split("."), *([leaf] if leaf else []))
        entries[path] = Entry(path, f"{name}.{kind}" if kind else name, shape, rows, columns, layers, turned)

    def plain(name: str, *shape: int) -> None:
        add(name, "", "", shape, shape, (), None)

    def linear(name: str, rows: Shape, columns: Shape, layers: int | None = None, *, bias: bool = True) -> None:
        add(name, "kernel", "weight", (math.prod(rows), math.prod(columns)), rows, columns, layers)
        if bias:
            add(name, "bias", "bias", (math.prod(rows),), rows, (), layers)

    def norm(name: str, size: int, layers: int | None = None) -> None:
        add(name, "scale", "weight", (size,), (size,), (), layers)
        add(name, "bias", "bias", (size,), (size,), (), layers)

    def grouped(name: str, inputs: int, outputs: int) -> None:
        count = len(config.robots)
        add(name, "kernel", "weight", (count, inputs, outputs), (count, inputs, outputs), (), None)
        add(name, "bias", "bias", (count, outputs), (count, outputs), (), None)

    def layer(name: str, heads: Shape, ffn: int, memory: int, layers: int, *, modulated: bool) -> None:
        size = math.prod(heads)
        if not modulated:
            norm(f"{name}.norm", size, layers)
        linear(f"{name}.q", heads, (size,), layers)
        linear(f"{name}.k", heads, (memory,), layers)
        linear(f"{name}.v", heads, (memory,), layers)
        linear(f"{name}.out", (size,), heads, layers)
        norm(f"{name}.ffn_norm", size, layers)
        linear(f"{name}.up", (ffn,), (size,), layers)
        linear(f"{name}.down", (size,), (ffn,), layers)

    bridge, dit, body = config.bridge, config.dit, config.embodiment
    plain("bridge.queries", bridge.queries, bridge.width)
    norm("bridge.intent_norm", config.intent_width)
    linear("bridge.project", (bridge.width,), (config.intent_width,))
    if bridge.places:
        plain("bridge.places.cameras", bridge.cameras + 1, bridge.width)
        linear("bridge.places.project", (bridge.width,), (PLACE_VALUES,), bias=False)
    heads = (bridge.heads, bridge.width // bridge.heads)
    for which in ("cross", "own"):
        layer(f"bridge.blocks.{{}}.{which}", heads, bridge.ffn, bridge.width, bridge.blocks, modulated=False)
    norm("bridge.norm", bridge.width)

    linear("dit.time.inner", (dit.width,), (dit.time_features,))
    linear("dit.time.outer", (dit.width,), (dit.width,))
    for which, memory in (("cross", bridge.width), ("own", dit.width)):
        linear(f"dit.pairs.{{}}.{which}.modulate", (2, dit.width), (dit.width,), dit.layers // 2)
        layer(f"dit.pairs.{{}}.{which}.layer", (dit.heads, dit.head_dim), dit.ffn, memory, dit.layers // 2, modulated=True)
    linear("dit.modulate", (2, dit.width), (dit.width,))

    grouped("embodiments.state_inner", body.state_width, body.hidden)
    grouped("embodiments.state_outer", body.hidden, dit.width)
    grouped("embodiments.action_inner", body.patch * body.action_width, dit.width)
    grouped("embodiments.action_timed", 2 * dit.width, dit.width)
    grouped("embodiments.action_outer", dit.width, dit.width)
    grouped("embodiments.decode_inner", dit.width, body.hidden)
    grouped("embodiments.decode_outer", body.hidden, body.patch * body.action_width)
    plain("future_tokens", bridge.queries, dit.width)
    plain("action_places", config.action_tokens, dit.width)
    norm("future_head.norm", dit.width)
    linear("future_head.inner", (bridge.width,), (dit.width,))
    linear("future_head.outer", (bridge.width,), (bridge.width,))
    return entries


# --- writing -----------------------------------------------------------------------------------------------------------------


def new_policy(
    model_directory: PathLike, config: PolicyConfig, robots: Mapping[str, Robot], statistics: Mapping[str, Statistics], *, seed: int = 0
) -> None:
    """Write policy/ beside the backbone of a MODEL, with weights as they are before any training and a row for each robot."""
    from blm_jax.models.policy import random_policy  # late, as jax is everywhere here

    check_backbone(config, read_config(model_directory))
    target = open_path(model_directory) / POLICY
    if target.exists():  # before all of the backbone is read
        raise RequestError(f"{target} exists; choose another directory or remove it")
    files = PolicyFiles(config, dict(robots), dict(statistics), "")
    write_policy(target, replace(files, backbone=fingerprint(model_directory)), random_policy(config, seed=seed))


def write_policy(directory: PathLike, files: PolicyFiles, params: Mapping[str, Any]) -> None:
    """Write policy/ of a MODEL, whole or not at all. In a run of several processes each calls this, and the first one writes."""
    target = open_path(directory)
    if target.exists():
        raise RequestError(f"{target} exists; choose another directory or remove it")
    entries = table(files.config)
    arrays = dict(leaves(params))
    _check_tree({path: leaf.shape for path, leaf in arrays.items()}, entries, "the parameters to be written")
    leads = _leads()
    partial = target.parent / f".{target.name}.partial" if is_local(target) else target
    try:
        if leads and partial is not target:
            partial.rmtree(missing_ok=True)  # what a killed run left
        if leads:
            partial.mkdir(parents=True)
        _fill(partial, files, entries, arrays, leads)
        if leads and partial is not target:
            os.rename(partial, target)
    except BaseException as error:
        if leads:
            partial.rmtree(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"writing {target} failed: {error.strerror or error}") from error
        raise


def _fill(directory: epath.Path, files: PolicyFiles, entries: Mapping[Path, Entry], arrays: Mapping[Path, Any], leads: bool) -> None:
    _write_weights(directory / WEIGHTS, entries, arrays, leads)
    if leads:
        (directory / TWIN.name).write_bytes(TWIN.read_bytes())
        (directory / CONTRACT).write_text(json.dumps(contract(files), indent=2, allow_nan=False) + "\n")


def _write_weights(path: epath.Path, entries: Mapping[Path, Entry], arrays: Mapping[Path, Any], leads: bool) -> None:
    """One array of the tree at a time: it is gathered from all devices, and the first process writes its layers."""
    ordered = sorted(entries.values(), key=lambda entry: -np.dtype(arrays[entry.path].dtype).itemsize)  # wide numbers first
    described = {tensor.name: (np.dtype(arrays[entry.path].dtype), entry.hub_shape) for entry in ordered for tensor in entry.tensors()}
    wrong = [name for name, (dtype, _) in described.items() if dtype not in CODES]
    if wrong:
        raise RequestError(f"{some(wrong)} of dtype {described[wrong[0]][0]}, not one of {', '.join(dtype.name for dtype in CODES)}")
    if not leads:
        for entry in ordered:
            _on_host(arrays[entry.path])
        return
    with path.open("wb") as file:
        file.write(PlannedFile(path.name, described).header())
        for entry in ordered:
            stacked = _on_host(arrays[entry.path])
            for tensor in entry.tensors():
                block = np.empty(entry.block, stacked.dtype)
                copy_cast(stacked if tensor.layer is None else stacked[tensor.layer], block.transpose(entry.order))
                file.write(block.view(np.uint8).data)
        file.flush()
        if is_local(path):
            os.fsync(file.fileno())


def _leads() -> bool:
    import jax

    return jax.process_index() == 0


def _on_host(leaf: Any) -> np.ndarray:
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def copy_policy(model_directory: PathLike, target: epath.Path) -> None:
    """The policy of one MODEL into the policy/ of another: byte for byte, or made of what was trained. Its contract last."""
    directory = newest_of_run(open_path(model_directory))
    target.mkdir(parents=True, exist_ok=True)
    if is_trained(directory):
        entries, arrays = _open_trained(directory)
        _fill(target, read_policy(directory), entries, {path: _Whole(array) for path, array in arrays.items()}, leads=True)
        return
    for path in sorted(_contents(directory / POLICY), key=lambda path: path.name == CONTRACT):
        with path.open("rb") as read, (target / path.name).open("wb") as written:
            shutil.copyfileobj(read, written)


@dataclass(frozen=True)
class _Whole:
    """An array that is read when it is asked for, and not kept."""

    array: ts.TensorStore

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype.numpy_dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array.read().result()


def policy_bytes(model_directory: PathLike) -> int:
    directory = newest_of_run(open_path(model_directory))
    if is_trained(directory):
        return sum(4 * math.prod(entry.shape) for entry in table(read_policy(directory).config).values())
    return sum(path.stat().length for path in _contents(directory / POLICY))


def _contents(directory: epath.Path) -> list[epath.Path]:
    return [path for path in directory.iterdir() if not path.is_dir() and not path.name.startswith(".")]


# --- reading -----------------------------------------------------------------------------------------------------------------


def has_policy(model_directory: PathLike) -> bool:
    directory = newest_of_run(open_path(model_directory))
    return (_contract_path(directory) if is_trained(directory) else directory / POLICY).exists()


def check_policy(model_directory: PathLike) -> None:
    """Refuse a policy that is not whole, without reading its weights; those of a training checkpoint are read and checked."""
    directory = newest_of_run(open_path(model_directory))
    if is_trained(directory):
        entries, arrays = _open_trained(directory)
        check_values(directory, open_contents(directory), {(POLICY_PARAMS, *path): arrays[path] for path in entries})
    else:
        _open(directory)


def load_policy_params(model_directory: PathLike, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a nested dict of jax.ShapeDtypeStruct, each with its sharding, or None for the default device.

    Values are cast to the dtypes asked for. Each process reads the slices of its own devices.
    """
    import jax  # late: whoever reads the contract alone has no need of devices

    entries, read = _reader(newest_of_run(open_path(model_directory)))
    wanted = dict(leaves(abstract))
    _check_tree({path: leaf.shape for path, leaf in wanted.items()}, entries, "the model asked for")
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    loaded: dict[str, Any] = {}
    for path, leaf in wanted.items():
        parent = loaded
        for key in path[:-1]:
            parent = parent.setdefault(key, {})

        def part(index: Any, path: Path = path, leaf: Any = leaf) -> np.ndarray:
            return read(path, index, leaf)

        parent[path[-1]] = jax.make_array_from_callback(leaf.shape, leaf.sharding or default, part)
    return loaded


def _reader(directory: epath.Path) -> tuple[dict[Path, Entry], Callable[[Path, tuple[slice, ...], Any], np.ndarray]]:
    """The arrays of a policy, and what reads a slice of one of them in the dtype of a leaf."""
    if is_trained(directory):
        entries, arrays = _open_trained(directory)
        return entries, lambda path, index, leaf: _read_array(arrays[path], index, directory).astype(leaf.dtype, copy=False)
    entries, stored = _open(directory)
    return entries, lambda path, index, leaf: _read(entries[path], stored, index, leaf)


def _open_trained(directory: epath.Path) -> tuple[dict[Path, Entry], dict[Path, ts.TensorStore]]:
    entries = table(read_policy(directory).config)
    found = {path: described.shape for path, described in open_contents(directory).arrays[PARAMS].items()}
    shapes = {tuple(path.split("."))[1:]: shape for path, shape in found.items() if path.startswith(f"{POLICY_PARAMS}.")}
    _check_tree(shapes, entries, f"{directory / PARAMS}")
    return entries, open_arrays(directory / PARAMS, entries, below=(POLICY_PARAMS,))


def _read_array(array: ts.TensorStore, index: tuple[slice, ...], directory: epath.Path) -> np.ndarray:
    try:
        return np.asarray(array[index].read().result())
    except ValueError as error:
        raise RequestError(f"{directory / PARAMS} is damaged ({one_line(error)[:200]}); take another step's") from None


def _open(model_directory: PathLike) -> tuple[dict[Path, Entry], dict[str, Stored]]:
    entries = table(read_policy(model_directory).config)
    path = open_path(model_directory) / POLICY / WEIGHTS
    stored = read_header(path)
    wanted = {tensor.name: entry.hub_shape for entry in entries.values() for tensor in entry.tensors()}
    for names, state in (
        ([name for name in wanted if name not in stored], "missing"),
        ([name for name in stored if name not in wanted], f"not part of the policy that {CONTRACT} describes"),
    ):
        if names:
            raise RequestError(f"{path}: {some(names)} {state}; export the policy again")
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise RequestError(f"{path}: {name} has shape {list(stored[name].shape)}, {CONTRACT} makes it {list(shape)}; one is wrong")
    return entries, stored


def _read(entry: Entry, stored: Mapping[str, Stored], index: tuple[slice, ...], leaf: Any) -> np.ndarray:
    """A slice of an array of the tree, from the tensors of its layers."""
    slices: Slices = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True))
    out = np.empty([part.stop - part.start for part in slices], leaf.dtype)
    if entry.layers is None:
        _read_layer(Tensor(entry, None), stored, slices, out)
    else:
        for number, layer in enumerate(range(entry.layers)[slices[0]]):
            _read_layer(Tensor(entry, layer), stored, slices[1:], out[number])
    return out


def _read_layer(tensor: Tensor, stored: Mapping[str, Stored], slices: Slices, out: np.ndarray) -> None:
    entry = tensor.entry
    copy_cast(read_block(stored[tensor.name], entry.block, entry.hub_slices(slices)).transpose(entry.order), out)


def _check_tree(shapes: Mapping[Path, Shape], entries: Mapping[Path, Entry], what: str) -> None:
    for paths, state in ((set(entries) - set(shapes), "lacks"), (set(shapes) - set(entries), "has besides")):
        if paths:
            names = sorted(".".join(path) for path in paths)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RequestError(f"{what}: the tree {state} {', '.join(names[:3])}{more}; it is not of this policy's config")
    for path, shape in shapes.items():
        if tuple(shape) != entries[path].shape:
            wanted = list(entries[path].shape)
            raise RequestError(f"{what}: {'.'.join(path)} has shape {list(shape)}, the policy's config makes it {wanted}")
