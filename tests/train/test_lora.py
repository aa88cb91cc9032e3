"""Adapters beside products are the same as adapters added to weights, for us, for an export, and for peft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from peft import PeftModel
from transformers import Qwen2_5_VLForConditionalGeneration

from blm_jax import mesh as meshes
from blm_jax.batch import Batch
from blm_jax.cli import main
from blm_jax.config import ComputeConfig, LoraConfig
from blm_jax.models.mllm import abstract_params, with_params
from blm_jax.recipe import OptimizerConfig
from blm_jax.train.command import train_run
from blm_jax.weights.load import load_params
from blm_jax.weights.names import leaves, nested
from blm_jax.weights.source import read_config
from tests.train.worlds import World, make_world

LORA = LoraConfig(rank=4, alpha=6.0, targets=("q", "k", "out", "gate", "down"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """Trained so fast that adapters matter."""
    world = make_world(tmp_path_factory.mktemp("world"))
    out = world.folder / "run"
    asked = world.stage_one(out, steps=4, optimizer=OptimizerConfig(rate=3e-2, warmup=0.0))
    assert asked.stage_one is not None
    train_run(replace(asked, stage_one=replace(asked.stage_one, lora=LORA)))
    return world, out


def tokens(vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (2, 12))


def merged(path: Path) -> Any:
    config = read_config(path)
    return with_params(config, ComputeConfig(), load_params(path, abstract_params(config)))


def logits(model: Any) -> np.ndarray:
    ids = tokens(1000).astype(np.int32)
    positions = np.broadcast_to(np.arange(12), (2, 3, 12)).astype(np.int32)
    batch = Batch(ids, np.ones_like(ids), positions, np.full_like(ids, -1), ids, np.ones(ids.shape, np.float32))
    return np.asarray(jax.jit(lambda model, batch: model(batch))(model, meshes.put(batch, None)))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens(1000))).logits.numpy()


def test_merged_is_applied_and_exported(run: tuple[World, Path], tmp_path: Path) -> None:
    world, out = run
    config = read_config(world.model)
    checkpoint = out / "checkpoints" / "4"
    merged_logits = logits(merged(checkpoint))
    assert np.abs(merged_logits - logits(merged(Path(world.model)))).max() > 0.05  # they matter

    shapes = dict(leaves(abstract_params(config, lora=LORA)))
    own = dict(leaves(ocp.PyTreeCheckpointer().restore(checkpoint.absolute() / "params")))
    base = dict(leaves(load_params(world.model, abstract_params(config))))
    assert set(own) == set(shapes) - set(base)  # adapters were trained, and nothing else
    params = nested({path: jnp.asarray(np.asarray(own.get(path, base.get(path)))) for path in shapes})
    applied = logits(with_params(config, ComputeConfig(), params, lora=LORA))
    np.testing.assert_allclose(applied, merged_logits, atol=1e-4)

    assert main(["convert", str(checkpoint), str(tmp_path / "hf"), "--to", "hf"]) == 0
    exported = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    np.testing.assert_allclose(torch_logits(exported), merged_logits, atol=1e-4)

    assert main(["convert", str(checkpoint), str(tmp_path / "adapter"), "--to", "adapter"]) == 0
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(world.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(torch_logits(loaded), merged_logits, atol=1e-4)
    assert not [name for name, _ in loaded.named_parameters() if "visual" in name and "lora" in name]


def test_only_adapters_can_be_exported_as_such(run: tuple[World, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world, _ = run
    assert main(["convert", world.model, str(tmp_path / "adapter"), "--to", "adapter"]) == 2
    assert "has no low-rank adapters" in capsys.readouterr().err and not (tmp_path / "adapter").exists()
