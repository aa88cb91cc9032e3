"""A training checkpoint as a MODEL: what was trained from its params/, what was frozen from the base that it names.

The base is held to be the one trained on while the names, sizes and times of its files are those noted when the run began; a base
that is itself a training checkpoint is known by the digest of its contents. Otherwise all of it is read for its fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.data.files import one_line, open_path, read_json
from blm_jax.errors import RequestError
from blm_jax.weights.adapters import AdaptedSource, Adapters, adapter_table, read_lora
from blm_jax.weights.checkpoint import ASSETS, COMMIT, PARAMS, PROVENANCE, CheckpointSource, open_arrays, read_config
from blm_jax.weights.form import Source
from blm_jax.weights.hashing import fingerprint_of
from blm_jax.weights.names import Entry, Path, Slices, Tensor, some, table
from blm_jax.weights.safetensors_file import ByteCount, is_local
from blm_jax.weights.steps import (
    CHECKPOINTS,
    CONTENTS,
    Contents,
    DamageError,
    check_files,
    compare_sums,
    finished_steps,
    read_contents,
    sum_of_part,
)

_CACHE = 4 * 2**30  # bytes: a large embedding, whose chunks are columns, is read by rows
OpenSource = Callable[[str, str | None], Source]  # a base may be of any form
POLICY_PARAMS = "policy"  # below params/, of Stage II
_KNOWN: dict[tuple[str, str | None, str], str] = {}  # fingerprints of bases that this process has read: by path, --backbone and stamp


def is_trained(directory: epath.Path) -> bool:
    return (directory / CONTENTS).exists()


def newest_of_run(directory: epath.Path) -> epath.Path:
    """RUN's newest checkpoint that is not damaged; any other directory as it is."""
    runs = directory / CHECKPOINTS
    if not runs.is_dir() or (directory / "config.json").exists():
        return directory
    for step in reversed(finished_steps(runs)):
        try:
            check_files(runs / str(step), read_contents(runs / str(step)))
        except DamageError as damage:
            _say_once(f"{runs / str(step)} is damaged: {damage}; passed over")
        else:
            return runs / str(step)
    raise RequestError(f"{runs} has no checkpoint that is finished and not damaged: train on, or name another MODEL")


@functools.cache
def _say_once(line: str) -> None:
    print(f"blm: {line}", file=sys.stderr, flush=True)


def open_contents(directory: epath.Path) -> Contents:
    """What a training checkpoint holds; its small files are as they were written."""
    if not (directory / COMMIT).exists():
        raise RequestError(f"{directory} is no finished checkpoint: what wrote or removed it was stopped; take another step's")
    try:
        contents = read_contents(directory)
        check_files(directory, contents)
    except DamageError as damage:
        raise RequestError(f"{directory} is damaged: {damage}; take another step's") from None
    return contents


def check_values(directory: epath.Path, contents: Contents, arrays: Mapping[Path, ts.TensorStore]) -> None:
    """Refuse values that are not those that were written. Reads all of them, a chunk at a time."""
    try:
        compare_sums(PARAMS, {".".join(path): _sum_of(array) for path, array in arrays.items()}, contents.arrays[PARAMS])
    except DamageError as damage:
        raise RequestError(f"{directory} is damaged: {damage}; take another step's") from None
    except ValueError as error:  # of tensorstore
        raise RequestError(f"{directory / PARAMS} is damaged ({one_line(error)[:200]}); take another step's") from None


def _sum_of(array: ts.TensorStore) -> int:
    chunk: tuple[int, ...] = array.chunk_layout.read_chunk.shape or array.shape  # pyright: ignore
    total = 0
    for place in np.ndindex(*(-(-size // step) for size, step in zip(array.shape, chunk, strict=True))):
        part = tuple(slice(i * step, min((i + 1) * step, size)) for i, step, size in zip(place, chunk, array.shape, strict=True))
        total += sum_of_part(np.asarray(array[part].read().result()), array.shape, part)
    return total % 2**32


@dataclass(frozen=True)
class TrainedSource:
    """Weights of a backbone of which a part was trained. They are float32; the Hub's tensors made of them have the base's dtypes."""

    directory: epath.Path
    config: BackboneConfig
    contents: Contents
    own: CheckpointSource  # of what was trained
    base: Source  # of all the rest
    count: ByteCount = field(default_factory=ByteCount)

    @staticmethod
    def open(directory: epath.Path, backbone: str | None, open_source: OpenSource) -> TrainedSource | AdaptedSource:
        contents = open_contents(directory)
        said = read_json(directory / PROVENANCE)
        config = read_config(directory)
        entries = table(config)
        trained = {tuple(path.split(".")): array for path, array in contents.arrays[PARAMS].items()}
        trained = {path: array for path, array in trained.items() if path[0] != POLICY_PARAMS}
        if said.get("lora"):
            base = _open_base(directory, said.get("base"), backbone, open_source)
            adapters = open_adapters(directory, contents, config, said["lora"])
            return AdaptedSource(base, adapters, directory / ASSETS, backbone or said["base"]["path"])
        unknown = [".".join(path) for path in trained if path not in entries]
        if unknown:
            raise RequestError(f"{directory / PARAMS}: {some(unknown)} not part of the model that {ASSETS}/config.json describes")
        own = {path: entry for path, entry in entries.items() if path in trained}
        base = _open_base(directory, said.get("base"), backbone, open_source)
        if base.entries != entries:
            raise RequestError(f"{directory} was trained on a model of another shape than {base.assets() / 'config.json'} describes")
        arrays = open_arrays(directory / PARAMS, own, cache=_CACHE)
        return TrainedSource(directory, config, contents, CheckpointSource(directory, config, own, arrays, {}), base)

    @property
    def entries(self) -> dict[Path, Entry]:
        return self.base.entries

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        return self.base.dtype_of(tensor)

    def dtype(self, entry: Entry) -> np.dtype:
        return self.base.dtype(entry)

    def read_tensor(self, tensor: Tensor, slices: Slices) -> np.ndarray:
        if tensor.entry.path not in self.own.entries:
            return self._counted(self.base.read_tensor(tensor, slices))
        return self._counted(self.own.read_tensor(tensor, slices)).astype(self.dtype_of(tensor), copy=False)

    def fill(self, entry: Entry, index: Slices, out: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """What was trained keeps all its bits where float32 is asked for."""
        (self.own if entry.path in self.own.entries else self.base).fill(entry, index, out, pool)
        self.count.add(out.nbytes)

    def _counted(self, block: np.ndarray) -> np.ndarray:
        self.count.add(block.nbytes)
        return block

    def assets(self) -> epath.Path:
        return self.directory / ASSETS

    def readers(self) -> int:
        return min(self.base.readers(), self.own.readers()) if self.own.entries else self.base.readers()

    def check_values(self) -> None:
        check_values(self.directory, self.contents, self.own.arrays)


def open_adapters(directory: epath.Path, contents: Contents, config: BackboneConfig, lora: Any) -> Adapters:
    known = read_lora(lora, directory / PROVENANCE)
    entries = adapter_table(config, known)
    arrays = open_arrays(directory / PARAMS, entries)
    check_values(directory, contents, arrays)  # they are small
    return Adapters(known, entries, arrays)


# The base


def describe_base(path: str, fingerprint: str) -> dict[str, str]:
    """What a checkpoint notes of the MODEL that a run began from, given its fingerprint."""
    directory = newest_of_run(open_path(path))  # a run may go on: what is noted is one checkpoint
    where = os.path.abspath(directory) if is_local(directory) else os.fspath(directory)
    return {"path": where, "fingerprint": fingerprint, "stamp": stamp(epath.Path(where))}


def stamp(directory: epath.Path) -> str:
    """A digest that changes where the files of a MODEL do, without reading its weights."""
    if is_trained(directory):
        return open_contents(directory).digest  # of every value, and of the base's fingerprint
    seen = []
    for folder in (directory, *(directory / name for name in (PARAMS, ASSETS) if (directory / name).is_dir())):
        stats = [(path, path.stat()) for path in _files(folder, deep=folder.name == PARAMS)]
        seen += [[str(path.relative_to(directory)), stat.length, stat.mtime] for path, stat in stats]
    return "sha256:" + hashlib.sha256(json.dumps(sorted(seen)).encode()).hexdigest()


def _files(folder: epath.Path, *, deep: bool) -> list[epath.Path]:
    found = list(folder.iterdir())
    below = [file for path in found if deep and path.is_dir() for file in _files(path, deep=True)]
    return [path for path in found if not path.is_dir()] + below


def _open_base(directory: epath.Path, base: Any, backbone: str | None, open_source: OpenSource) -> Source:
    if not isinstance(base, Mapping) or not all(isinstance(base.get(key), str) for key in ("path", "fingerprint")):
        raise RequestError(f"{directory / PROVENANCE} does not say on which base MODEL it was trained; take another step's")
    path = base["path"]
    if backbone is not None and not is_trained(open_path(path)):
        path, backbone = backbone, None  # at the end of the chain; a base between is found where it was
    where = open_path(path)
    if not where.is_dir():
        gone = "is not there" if path == base["path"] else "is no directory"
        raise RequestError(f"{directory} was trained on {base['path']}: {path} {gone}; say where the base lies now with --backbone PATH")
    source = open_source(path, backbone)
    now = stamp(newest_of_run(where))
    if now != base.get("stamp"):
        found = _KNOWN[path, backbone, now] = _KNOWN.get((path, backbone, now)) or fingerprint_of(source, show=True)
        if found != base["fingerprint"]:
            raise RequestError(
                f"{directory} was trained on a base with fingerprint {base['fingerprint'][:23]}..., but that of {path} is "
                f"{found[:23]}...: give the one it was trained on with --backbone PATH"
            )
    return source
