"""From a MODEL directory, of either form, straight to the shards of a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from blm_jax.errors import RequestError
from blm_jax.weights.names import Entry, Path, Slices, leaves
from blm_jax.weights.source import PathLike, Source, open_source

_THREADS = 8  # reading waits for disks and networks, not for cores


def load_params(path: PathLike, abstract: Mapping[str, Any], backbone: PathLike | None = None) -> dict[str, Any]:
    """Fill a nested dict of jax.ShapeDtypeStruct (each with its sharding, or None for the default device).

    Values are cast to the dtypes asked for. What is not asked for is not read: leave out the head, or ask for fewer
    layers of every stack. Each process reads the slices of its own devices, a replicated slice once, and holds one
    shard of one array at a time.
    """
    source = open_source(path, backbone)
    wanted = list(leaves(abstract))
    for place, leaf in wanted:
        _check(source, place, leaf)
    total = sum(_local_bytes(leaf) for _, leaf in wanted)
    loaded: dict[str, Any] = {}
    disable = None if jax.process_index() == 0 else True  # None: shown on a terminal only
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=disable, leave=False, mininterval=1)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for place, leaf in wanted:
            parent = loaded
            for key in place[:-1]:
                parent = parent.setdefault(key, {})
            parent[place[-1]] = _load(source, source.entries[place], leaf, pool)
            bar.update(_local_bytes(leaf))
    return loaded


def _check(source: Source, place: Path, leaf: jax.ShapeDtypeStruct) -> None:
    entry = source.entries.get(place)
    if entry is None:
        raise RequestError(f"these weights have no {'.'.join(place)}: the model asked for is another than config.json describes")
    fewer = entry.layers is not None and leaf.shape[1:] == entry.shape[1:] and leaf.shape[0] <= entry.layers
    if leaf.shape != entry.shape and not fewer:
        raise RequestError(f"{'.'.join(place)} has shape {list(entry.shape)}, but the model asked for wants {list(leaf.shape)}")


def _sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _slices(index: tuple[slice, ...], shape: tuple[int, ...]) -> Slices:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _shards(leaf: jax.ShapeDtypeStruct) -> dict[tuple[tuple[int, int], ...], list[Any]]:
    """Which of this process's devices hold which slice: (start, stop) of every axis -> devices."""
    shards: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in _sharding(leaf).addressable_devices_indices_map(leaf.shape).items():
        slices = _slices(index or (), leaf.shape)
        shards.setdefault(tuple((part.start, part.stop) for part in slices), []).append(device)
    return shards


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return sum(math.prod(stop - start for start, stop in key) for key in _shards(leaf)) * leaf.dtype.itemsize


def _load(source: Source, entry: Entry, leaf: jax.ShapeDtypeStruct, pool: ThreadPoolExecutor) -> jax.Array:
    parts: list[jax.Array] = []
    for key, devices in _shards(leaf).items():
        index = tuple(slice(start, stop) for start, stop in key)
        shard = np.empty([stop - start for start, stop in key], leaf.dtype)
        source.fill(entry, index, shard, pool)
        # Wait: the host's copy must be free before the next one is made.
        parts += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, _sharding(leaf), parts)
