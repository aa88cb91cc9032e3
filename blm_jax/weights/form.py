"""What all forms of a MODEL have in common."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.weights.names import Entry, Path, Slices, Tensor
from blm_jax.weights.safetensors_file import ByteCount


class Source(Protocol):
    """Weights in a directory, opened."""

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
