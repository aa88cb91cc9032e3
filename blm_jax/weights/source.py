"""A MODEL directory of either form, opened."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.data.files import open_path
from blm_jax.errors import RequestError
from blm_jax.weights.checkpoint import ASSETS, CheckpointSource, is_checkpoint
from blm_jax.weights.checkpoint import read_config as checkpoint_config
from blm_jax.weights.config_json import from_json, read_config_json
from blm_jax.weights.hub import HubSource
from blm_jax.weights.names import Entry, Path, Slices, Tensor
from blm_jax.weights.safetensors_file import ByteCount

PathLike = str | os.PathLike[str]


class Source(Protocol):
    """Weights in a directory: what the Hub's layout and the orbax form have in common."""

    @property
    def config(self) -> BackboneConfig: ...
    @property
    def entries(self) -> dict[Path, Entry]: ...
    @property
    def count(self) -> ByteCount: ...

    def dtype_of(self, tensor: Tensor) -> np.dtype: ...
    def dtype(self, entry: Entry) -> np.dtype: ...
    def read_tensor(self, tensor: Tensor, slices: Slices) -> np.ndarray: ...
    def fill(self, entry: Entry, index: Slices, out: np.ndarray, pool: ThreadPoolExecutor) -> None: ...
    def assets(self) -> epath.Path: ...
    def readers(self) -> int: ...


def open_source(path: PathLike) -> Source:
    directory = _directory(path)
    return CheckpointSource.open(directory) if is_checkpoint(directory) else HubSource.open(directory)


def read_config(path: PathLike) -> BackboneConfig:
    """The config of a MODEL of either form."""
    directory = _directory(path)
    if is_checkpoint(directory):
        return checkpoint_config(directory)
    return from_json(read_config_json(directory), str(directory / "config.json"))


def assets_dir(path: PathLike) -> epath.Path:
    """Where config.json, the tokenizer's files and the like of a MODEL lie."""
    directory = _directory(path)
    return directory / ASSETS if is_checkpoint(directory) else directory


def _directory(path: PathLike) -> epath.Path:
    directory = open_path(path)
    if not directory.is_dir():
        raise RequestError(f"{path} is not a directory; MODEL is a Hugging Face directory or a checkpoint")
    return directory
