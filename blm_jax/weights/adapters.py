"""Low-rank adapters: added to the weights they stand beside, or written as peft reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from blm_jax.config import BackboneConfig, LoraConfig
from blm_jax.errors import RequestError
from blm_jax.weights.names import Entry, Path, Slices, Tensor, table
from blm_jax.weights.safetensors_file import ByteCount, copy_cast

ADAPTER, DOWN, UP = "adapter", "down", "up"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_lora(said: Any, source: object) -> LoraConfig:
    """As a checkpoint's provenance has it."""
    try:
        return LoraConfig(int(said["rank"]), float(said["alpha"]), tuple(map(str, said["targets"])))
    except (KeyError, TypeError, ValueError):
        raise RequestError(f"{source}: lora must say rank, alpha and targets; take another step's") from None


def adapter_table(config: BackboneConfig, lora: LoraConfig) -> dict[Path, Entry]:
    """Every array of the adapters, named as peft names its tensors."""
    entries = table(config)
    found = {}
    for target in lora.targets:
        kernel = entries["decoder", "blocks", target, "kernel"]
        hub = f"base_model.model.{kernel.hub_name.replace('model.layers', 'model.language_model.layers').removesuffix('.weight')}"
        out, inner = kernel.hub_shape
        down, up = (*kernel.path[:-1], ADAPTER, DOWN), (*kernel.path[:-1], ADAPTER, UP)
        found[down] = Entry(down, f"{hub}.lora_A.weight", (lora.rank, inner), (lora.rank,), kernel.columns, kernel.layers)
        found[up] = Entry(up, f"{hub}.lora_B.weight", (out, lora.rank), kernel.rows, (lora.rank,), kernel.layers)
    return found


@dataclass(frozen=True)
class Adapters:
    """Small beside what they stand beside: held whole, float32."""

    lora: LoraConfig
    entries: Mapping[Path, Entry]
    arrays: Mapping[Path, Any]  # as tensorstore opens them

    @cached_property
    def _values(self) -> dict[Path, np.ndarray]:
        return {path: np.asarray(array.read().result(), np.float32) for path, array in self.arrays.items()}

    def beside(self, entry: Entry) -> bool:
        return (*entry.path[:-1], ADAPTER, DOWN) in self.entries and entry.path[-1] == "kernel"

    def added(self, entry: Entry, layer: int, slices: Slices) -> np.ndarray:
        """What is added to a slice of one layer, in the tree's order."""
        down, up = (self._values[(*entry.path[:-1], ADAPTER, name)][layer] for name in (DOWN, UP))
        inputs = len(entry.columns)
        product = np.tensordot(down[(*slices[:inputs], slice(None))], up[(slice(None), *slices[inputs:])], 1)
        return product * (self.lora.alpha / self.lora.rank)

    def tensors(self) -> dict[str, np.ndarray]:
        """Named and turned as peft has them."""
        found = {}
        for path, entry in self.entries.items():
            for tensor in entry.tensors():
                block = np.empty(entry.block, np.float32)
                stacked = self._values[path]
                copy_cast(stacked if tensor.layer is None else stacked[tensor.layer], block.transpose(entry.order))
                found[tensor.name] = block.reshape(entry.hub_shape)
        return found


@dataclass(frozen=True)
class AdaptedSource:
    """A MODEL's weights with adapters added. Sums are made in float32, then have the dtype of the weights."""

    base: Any  # a Source
    adapters: Adapters
    directory: epath.Path  # of the assets
    origin: str  # where the weights are that are not adapted

    @property
    def config(self) -> BackboneConfig:
        return self.base.config

    @property
    def entries(self) -> dict[Path, Entry]:
        return self.base.entries

    @property
    def count(self) -> ByteCount:
        return self.base.count

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        return self.base.dtype_of(tensor)

    def dtype(self, entry: Entry) -> np.dtype:
        return self.base.dtype(entry)

    def read_tensor(self, tensor: Tensor, slices: Slices) -> np.ndarray:
        block = self.base.read_tensor(tensor, slices)
        entry = tensor.entry
        if tensor.layer is None or not self.adapters.beside(entry):
            return block
        added = np.empty(block.shape, np.float32)
        copy_cast(self.adapters.added(entry, tensor.layer, entry.tree_slices(slices)), added.transpose(entry.order))
        return (block.astype(np.float32) + added).astype(block.dtype)

    def fill(self, entry: Entry, index: Slices, out: np.ndarray, pool: ThreadPoolExecutor) -> None:
        if entry.layers is None or not self.adapters.beside(entry):
            self.base.fill(entry, index, out, pool)
            return
        block = np.empty(out.shape, np.float32)
        self.base.fill(entry, index, block, pool)
        for number, layer in enumerate(range(entry.layers)[index[0]]):
            block[number] += self.adapters.added(entry, layer, index[1:])
        copy_cast(block, out)

    def assets(self) -> epath.Path:
        return self.directory

    def readers(self) -> int:
        return self.base.readers()


def write_for_peft(directory: epath.Path, adapters: Adapters, base: str) -> None:
    """What `PeftModel.from_pretrained(model, directory)` reads."""
    hub = {entry.hub_name.partition(".language_model.layers.{}.")[2].partition(".lora_")[0] for entry in adapters.entries.values()}
    inner = "|".join(sorted(name.replace(".", r"\.") for name in hub))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.lora.rank,
        "lora_alpha": adapters.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # A pattern: the vision tower has modules of the same names.
        "target_modules": rf".*language_model\.layers\.\d+\.({inner})",
        "inference_mode": True,
    }
    (directory / PEFT_WEIGHTS).write_bytes(save(adapters.tensors(), {"format": "pt"}))
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
