"""The orbax form of a MODEL.

    DIR/params/          the parameter tree, as stock orbax restores it
    DIR/assets/          config.json, the tokenizer's files, ...: verbatim
    DIR/provenance.json  where the weights come from, their fingerprint, the versions that wrote them
    DIR/commit_success.txt   written last

What is written here are plain zarr arrays, filled piece by piece (a stack is never held whole), byte for byte the same
however many processes write. What is read may also be what orbax saved from a live tree (OCDBT, any chunks).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import tensorstore as ts
from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.data.files import read_json
from blm_jax.errors import RequestError, RunError
from blm_jax.weights.config_json import Json, from_json, read_config_json, with_video_positions
from blm_jax.weights.names import PIECE_BYTES, Entry, Path, Shape, Slices, Tensor, piece_shape, pieces, some, table
from blm_jax.weights.safetensors_file import CODES, DTYPES, ByteCount, copy_cast, is_local

PARAMS, ASSETS, PROVENANCE, COMMIT = "params", "assets", "provenance.json", "commit_success.txt"
_TREE = "_METADATA"  # orbax's names for its own files
_ITEMS = "_CHECKPOINT_METADATA"
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_INNER_BYTES = 2**20  # the least that is read of an array: small enough for the slice of one device


def is_checkpoint(directory: epath.Path) -> bool:
    return (directory / PARAMS).is_dir()


def read_config(directory: epath.Path) -> BackboneConfig:
    """As the Hub's config.json says, but for what was chosen here."""
    positions = _provenance(directory).get("video_positions")
    raw = read_config_json(directory / ASSETS)
    return from_json(with_video_positions(raw, positions) if positions else raw, str(directory / ASSETS / "config.json"))


def _provenance(directory: epath.Path) -> Json:
    path = directory / PROVENANCE
    return read_json(path) if path.exists() else {}  # orbax alone writes none


@dataclass(frozen=True)
class CheckpointSource:
    """Weights in an orbax checkpoint. Opening checks every name and shape, before anything is read."""

    directory: epath.Path
    config: BackboneConfig
    entries: dict[Path, Entry]
    arrays: dict[Path, ts.TensorStore]
    narrowed: dict[str, str]  # Hub name -> dtype code, where it is narrower than its stack's
    count: ByteCount = field(default_factory=ByteCount)

    @staticmethod
    def open(directory: epath.Path) -> CheckpointSource:
        if not (directory / PARAMS / _TREE).exists() or not (is_local(directory) or (directory / COMMIT).exists()):
            raise RequestError(f"{directory} is no finished checkpoint: what wrote it was stopped; write it again")
        config = read_config(directory)
        entries = table(config)
        _check_names(directory / PARAMS, entries)
        arrays = open_arrays(directory / PARAMS, entries)
        return CheckpointSource(directory, config, entries, arrays, _provenance(directory).get("narrower_dtypes", {}))

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        code = self.narrowed.get(tensor.name)
        return DTYPES[code] if code else self.dtype(tensor.entry)

    def dtype(self, entry: Entry) -> np.dtype:
        return self.arrays[entry.path].dtype.numpy_dtype

    def read_tensor(self, tensor: Tensor, slices: Slices) -> np.ndarray:
        """A slice of one tensor in the Hub's order, its axes split as in `Entry.block`."""
        entry = tensor.entry
        index = entry.tree_slices(slices)
        block = self._read(entry, index if tensor.layer is None else (slice(tensor.layer, tensor.layer + 1), *index))
        block = block if tensor.layer is None else block[0]
        turned = np.empty([part.stop - part.start for part in slices], block.dtype)
        copy_cast(block, turned.transpose(entry.order))
        return _narrow(turned, self.dtype_of(tensor))

    def fill(self, entry: Entry, index: Slices, out: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """Put a slice of an array of the tree into `out`, in its dtype."""
        # A chunk is decoded whole: cut only where chunks are small.
        small = _chunk_bytes(self.arrays[entry.path]) <= PIECE_BYTES
        parts = pieces(out.shape, self.dtype(entry).itemsize) if small else [tuple(slice(0, size) for size in out.shape)]

        def job(part: Slices) -> None:
            moved = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(index, part, strict=True))
            copy_cast(self._read(entry, moved), out[part])

        for _ in pool.map(job, parts):
            pass

    def assets(self) -> epath.Path:
        return self.directory / ASSETS

    def readers(self) -> int:
        """How many pieces may be read at a time: a chunk is decoded whole, and orbax makes chunks as large as a device's shard."""
        largest = max(_chunk_bytes(array) for array in self.arrays.values())
        return max(1, min(4, 8 * PIECE_BYTES // largest))

    def _read(self, entry: Entry, index: Slices) -> np.ndarray:
        try:
            block = self.arrays[entry.path][index].read().result()
        except ValueError as error:
            raise RequestError(f"{self.directory}: {'.'.join(entry.path)} is damaged ({str(error).splitlines()[0][:200]})") from None
        self.count.add(block.nbytes)
        return block


def _chunk_bytes(array: ts.TensorStore) -> int:
    return math.prod(array.chunk_layout.read_chunk.shape or ()) * array.dtype.numpy_dtype.itemsize  # pyright: ignore


def _narrow(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Back to the dtype a value was widened from, bit for bit."""
    if block.dtype == np.float32 and dtype == DTYPES["BF16"]:
        return (block.view(np.uint32) >> 16).astype(np.uint16).view(dtype)  # a cast would touch the bits of NaNs
    return block if block.dtype == dtype else block.astype(dtype)


def _check_names(params: epath.Path, entries: Mapping[Path, Entry]) -> None:
    tree = read_json(params / _TREE)
    try:
        found = {tuple(key["key"] for key in value["key_metadata"]) for value in tree["tree_metadata"].values()}
    except (KeyError, TypeError, AttributeError):
        raise RequestError(f"{params / _TREE} is not what orbax writes; write the checkpoint again") from None
    for paths, state in ((set(entries) - found, "missing"), (found - set(entries), "not part of the model that config.json describes")):
        if paths:
            raise RequestError(f"{params}: {some(sorted('.'.join(map(str, path)) for path in paths))} {state}; write the checkpoint again")


def open_arrays(params: epath.Path, entries: Mapping[Path, Entry], below: Path = (), cache: int = 0) -> dict[Path, ts.TensorStore]:
    """Arrays that stand `below` a place in the tree that was written, perhaps among others. `cache`: bytes of chunks to keep."""
    tree = read_json(params / _TREE)
    driver, ocdbt = "zarr3" if tree.get("use_zarr3") else "zarr", bool(tree.get("use_ocdbt", True))
    # A file that is gone must not read as zeros, unless zeros were left out on purpose.
    missing = {"fill_missing_data_reads": not tree.get("store_array_data_equal_to_fill_value", False)}
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    specs = {path: {**_spec(params, below + path, driver, ocdbt=ocdbt), **missing, "recheck_cached_data": "open"} for path in entries}
    opening = {path: ts.open(spec, open=True, context=context) for path, spec in specs.items()}
    arrays = {}
    for path, entry in entries.items():
        try:
            arrays[path] = opening[path].result()
        except ValueError as error:
            raise RequestError(f"{params}: {'.'.join(path)} cannot be read ({str(error).splitlines()[0][:200]})") from None
        if arrays[path].shape != entry.shape:
            raise RequestError(f"{params}: {'.'.join(path)} has shape {list(arrays[path].shape)}, config.json makes it {list(entry.shape)}")
        if arrays[path].dtype.numpy_dtype not in CODES:
            raise RequestError(f"{params}: {'.'.join(path)} has dtype {arrays[path].dtype.name}, not one of {', '.join(DTYPES)}")
    return arrays


def _spec(params: epath.Path, path: Path, driver: str, *, ocdbt: bool) -> Json:
    name = ".".join(path)
    if ocdbt:
        return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": _kvstore(params), "path": f"{name}/"}}
    return {"driver": driver, "kvstore": _kvstore(params / name)}


def _kvstore(directory: epath.Path) -> Json | str:
    if is_local(directory):
        return {"driver": "file", "path": f"{os.path.abspath(directory)}/"}
    return directory.as_uri().rstrip("/") + "/"


# Writing


def array_spec(params: epath.Path, entry: Entry, dtype: np.dtype) -> Json:
    """A zarr array whose files are pieces of single layers, each of them tiles that can be read alone. Not compressed:
    weights hardly shrink, and their bytes do not depend on a compressor's version."""
    piece = piece_shape(entry.block, dtype.itemsize)
    chunk = tuple(piece[axis] for axis in entry.order)
    stacked = () if entry.layers is None else (1,)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    tiles = {
        "chunk_shape": [*stacked, *_tile(chunk, dtype.itemsize)],
        "codecs": [little],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    metadata = {
        "shape": list(entry.shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*stacked, *chunk]}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0.0,
        "codecs": [{"name": "sharding_indexed", "configuration": tiles}],
    }
    return {**_spec(params, entry.path, "zarr3", ocdbt=False), "metadata": metadata, "store_data_equal_to_fill_value": True}


def _tile(shape: Shape, itemsize: int) -> Shape:
    """Halve the longest even axis until a tile is small."""
    tile = list(shape)
    while math.prod(tile) * itemsize > _INNER_BYTES:
        even = [axis for axis, size in enumerate(tile) if size % 2 == 0]
        if not even:
            break
        tile[max(even, key=lambda axis: tile[axis])] //= 2
    return tuple(tile)


def create_arrays(params: epath.Path, entries: Mapping[Path, Entry], dtypes: Mapping[Path, np.dtype]) -> None:
    """Empty arrays for `write_piece` to fill: one process makes them for all."""
    for future in [ts.open(array_spec(params, entry, dtypes[path]), create=True) for path, entry in entries.items()]:
        future.result()


def open_for_writing(params: epath.Path, entries: Mapping[Path, Entry], dtypes: Mapping[Path, np.dtype]) -> dict[Path, ts.TensorStore]:
    opening = {path: ts.open(array_spec(params, entry, dtypes[path]), open=True) for path, entry in entries.items()}
    return {path: future.result() for path, future in opening.items()}


def write_piece(array: ts.TensorStore, tensor: Tensor, slices: Slices, block: np.ndarray) -> None:
    """Put a piece of a tensor, in the Hub's order, into its place: whole files of the array, so that none is read back."""
    entry = tensor.entry
    index = entry.tree_slices(slices)
    turned = np.empty([part.stop - part.start for part in index], array.dtype.numpy_dtype)
    copy_cast(block.transpose(entry.order), turned)
    try:
        array[index if tensor.layer is None else (tensor.layer, *index)].write(turned).result()
    except ValueError as error:  # of tensorstore, for whatever the file system says
        raise RunError(f"writing {tensor.name} failed ({str(error).splitlines()[0][:200]})") from error


def write_tree(directory: epath.Path, entries: Mapping[Path, Entry]) -> None:
    """The files by which orbax knows the arrays. Their leaves are called NumPy's, so that orbax asks for no sharding to restore them."""
    leaves = {}
    for path, entry in entries.items():
        keys = [{"key": key, "key_type": 2} for key in path]  # 2: of a dictionary
        value = {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(entry.shape)}
        leaves[str(path)] = {"key_metadata": keys, "value_metadata": value}
    tree = {
        "tree_metadata": leaves,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / PARAMS / _TREE).write_text(json.dumps(tree))
    items = {"item_handlers": {PARAMS: _HANDLER}, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    (directory / _ITEMS).write_text(json.dumps(items))


def provenance(origin: str, fingerprint: str, config: BackboneConfig, narrowed: Mapping[str, str]) -> Json:
    """What a checkpoint says of itself. No date: the same weights give the same files."""
    packages = ("blm-jax", "jax", "orbax-checkpoint", "tensorstore")
    return {
        "source": origin,
        "fingerprint": fingerprint,
        "video_positions": config.video_positions,
        "narrower_dtypes": dict(narrowed),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
