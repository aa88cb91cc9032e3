"""Directories in the Hub's layout, written by transformers, and what is read from them by other people's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blm_jax.config import BackboneConfig
from tests.models.oracle import torch_model

ASSETS = {"tokenizer.json": b'{"made": "up"}', "merges.txt": "#version: 0.2\nĠ t\n".encode(), "generation_config.json": b"{}"}


def save_hub(directory: Path, config: BackboneConfig, dtype: torch.dtype = torch.float32, shard: str = "50GB") -> Any:
    """transformers' own files, tokenizer files that need not be real, and the model they are of."""
    model: Any = torch_model(config)
    model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard)
    for name, content in ASSETS.items():
        (directory / name).write_bytes(content)
    return model


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Instead of the directory's weights: one file, no index."""
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
