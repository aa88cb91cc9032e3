"""Damaged and mistaken directories: one clear line each, whoever reads them, and nothing written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blm_jax.convert.command import convert
from blm_jax.errors import RequestError
from blm_jax.models.mllm import abstract_params
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.load import load_params
from tests.models.oracle import CASES
from tests.weights.hub_dirs import change_config, read_tensors, save_hub, write_tensors

CONFIG = CASES["plain"]
Q1 = "model.layers.1.self_attn.q_proj.weight"
SHARD = "model-00002-of-00005.safetensors"


def cut(directory: Path, size: int) -> None:
    path = directory / SHARD
    path.write_bytes(path.read_bytes()[:size])


def grow(directory: Path) -> None:
    path = directory / SHARD
    path.write_bytes(path.read_bytes() + b"more")


def scribble(directory: Path) -> None:
    path = directory / SHARD
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"[" + raw[9:])


def header_with(**changes: Any) -> Callable[[Path], None]:
    """One tensor's entry in the header changed."""

    def damage(directory: Path) -> None:
        path = directory / SHARD
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header[min(name for name in header if name != "__metadata__")] |= changes
        head = json.dumps(header).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])

    return damage


def nest(directory: Path) -> None:
    head = b'{"a":' * 100_000
    (directory / SHARD).write_bytes(len(head).to_bytes(8, "little") + head)


def replace_by_directory(directory: Path) -> None:
    """What cannot be opened at all; permissions would not stop root."""
    (directory / SHARD).unlink()
    (directory / SHARD).mkdir()


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: write_tensors(directory, {key: value for key, value in read_tensors(directory).items() if key != name})


def with_(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return lambda directory: write_tensors(directory, read_tensors(directory) | {name: value})


def reindex(directory: Path, name: str, file: Any) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def no_weights(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


def only_bin(directory: Path) -> None:
    no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")


BAD = {
    "truncated in its data": (lambda d: cut(d, 50_000), f"{SHARD} is truncated: its header speaks of"),
    "truncated in its header": (lambda d: cut(d, 200), f"{SHARD} is truncated or no safetensors file (200 bytes)"),
    "empty file": (lambda d: cut(d, 0), f"{SHARD} is truncated or no safetensors file (0 bytes)"),
    "longer than its header says": (grow, f"{SHARD} is longer than it should be"),
    "no JSON in the header": (scribble, f"{SHARD} has a damaged header"),
    "offsets that do not fit": (header_with(shape=[3, 5, 7]), f"{SHARD} has a damaged header"),
    "three offsets": (header_with(data_offsets=[0, 1, 2]), f"{SHARD} has a damaged header"),
    "one offset": (header_with(data_offsets=[0]), f"{SHARD} has a damaged header"),
    "offsets of text": (header_with(data_offsets=["0", "1"]), f"{SHARD} has a damaged header"),
    "a list of dtypes": (header_with(dtype=["F32"]), f"{SHARD} has a damaged header"),
    "a negative shape": (header_with(shape=[-1, -1], data_offsets=[0, 4]), f"{SHARD} has a damaged header"),
    "a shape of fractions": (header_with(shape=[1.0], data_offsets=[0, 4]), f"{SHARD} has a damaged header"),
    "a shape of booleans": (header_with(shape=[True], data_offsets=[0, 4]), f"{SHARD} has a damaged header"),
    "a header nested without end": (nest, f"{SHARD} has a damaged header"),
    "a directory for a file": (replace_by_directory, f"{SHARD} cannot be read: Is a directory"),
    "missing tensor": (without(Q1), f"{Q1} is missing from its safetensors files"),
    "extra tensor": (with_("model.extra.weight", torch.zeros(3)), "model.extra.weight is not part of the model that config.json describes"),
    "misshapen tensor": (with_(Q1, torch.zeros(64, 60)), f"{Q1} has shape [64, 60], config.json makes it [64, 64]"),
    "quantized tensor": (with_(Q1, torch.zeros(64, 64, dtype=torch.int8)), f"{Q1} has dtype I8, not one of F64, F32, F16, BF16"),
    "more layers in config.json": (
        lambda d: change_config(d, text_config=json.loads((d / "config.json").read_text())["text_config"] | {"num_hidden_layers": 4}),
        ", model.layers.3.self_attn.q_proj.weight, model.layers.3.self_attn.q_proj.bias and 9 more are missing from",
    ),
    "file of the index gone": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing; fetch it, or mend the index that names it"),
    "index names another file": (lambda d: reindex(d, "model.norm.weight", SHARD), "says that model.norm.weight is in"),
    "index names a tensor that is not": (lambda d: reindex(d, "model.none", SHARD), f"says that model.none is in {SHARD}, but it is not"),
    "index names a number": (lambda d: reindex(d, "model.norm.weight", 3), "its weight_map must name safetensors files beside it"),
    "index names a list": (lambda d: reindex(d, "model.norm.weight", ["x"]), "its weight_map must name safetensors files beside it"),
    "index names a directory": (lambda d: reindex(d, "model.norm.weight", "."), "its weight_map must name safetensors files beside it"),
    "index without a map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "index no JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "model.safetensors.index.json cannot be read as JSON",
    ),
    "no config.json": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config.json no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "no weights": (no_weights, "has no weights: neither model.safetensors.index.json nor model.safetensors"),
    "no safetensors": (only_bin, "has no model.safetensors.index.json or model.safetensors (there is pytorch_model.bin)"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("sound")
    save_hub(directory, CONFIG, shard="200KB")
    assert len(list(directory.glob("*.safetensors"))) == 5
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_are_refused_in_one_line(name: str, sound: dict[str, bytes], tmp_path: Path) -> None:
    damage, message = BAD[name]
    source = tmp_path / "source"
    source.mkdir()
    for file, content in sound.items():
        (source / file).write_bytes(content)
    damage(source)
    said = set()
    for read in (
        lambda: load_params(source, abstract_params(CONFIG)),
        lambda: fingerprint(source),
        lambda: convert(source, tmp_path / "out", "checkpoint"),
        lambda: convert(source, tmp_path / "out", "hf"),
    ):
        with pytest.raises(RequestError) as caught:
            read()
        said.add(str(caught.value))
    assert len(said) == 1 and message in said.pop() and "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("read", [fingerprint, lambda path: load_params(path, {}), lambda path: convert(path, "out", "hf")])
def test_a_bucket_that_nothing_here_reads(read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"gs://bucket/model lies in a bucket: .*pip install 'blm-jax\[gcs\]'"):
        read("gs://bucket/model")
