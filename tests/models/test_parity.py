"""Ours against transformers (PyTorch, CPU, float32) on small random models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blm_jax.batch import Batch
from blm_jax.config import BackboneConfig, ComputeConfig
from blm_jax.data.collate import collate
from blm_jax.data.vision.pixels import PixelConfig, levels_of, normalise
from blm_jax.models.mllm import Mllm, random_params, with_params
from tests.models.chats import IMAGE, IMAGES, MIXED, TEXT, VIDEO, make_example, torch_inputs
from tests.models.oracle import CASES, grads_of, params_of, torch_model

KINDS = {"text": TEXT, "image": IMAGE, "images": IMAGES, "video": VIDEO, "mixed": MIXED}
FLOAT32 = ComputeConfig()


def as_reference(config: BackboneConfig) -> BackboneConfig:
    return replace(config, video_positions="transformers-5.23")


@jax.jit
def run(model: Mllm, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
    """Logits, and the hidden states after every block."""
    return model(batch), [model.hidden(batch, blocks) for blocks in range(model.config.decoder.layers + 1)]


def reference(model: Any, inputs: dict[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The reference's last hidden state comes after its final norm: the one before it is caught on the way."""
    caught = []
    hook = model.model.language_model.layers[-1].register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    hook.remove()
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return output.logits.numpy(), [state.numpy() for state in (*output.hidden_states[:-1], last)]


def test_bytes_are_what_their_levels_say() -> None:
    """Pictures may stay bytes until they are on the devices: the model makes of them what the host would have made."""
    config = next(iter(CASES.values()))
    model = with_params(config, FLOAT32, random_params(config, jnp.dtype("float32"), None, 0))
    batch = collate([[make_example(config, IMAGES, 0)]], config)
    assert batch.vision is not None
    pixels = PixelConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    drawn = np.random.default_rng(0).integers(0, 256, batch.vision.patches.shape, np.uint8)
    by_bytes = replace(batch, vision=replace(batch.vision, patches=drawn, levels=levels_of(pixels)))
    told = normalise(drawn.reshape(-1, drawn.shape[-1]), pixels).reshape(drawn.shape)
    by_values = replace(batch, vision=replace(batch.vision, patches=told))
    of_bytes, of_values = (model(jax.tree.map(jnp.asarray, one)) for one in (by_bytes, by_values))
    np.testing.assert_allclose(of_bytes, of_values, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_hidden_state(name: str) -> None:
    """Five kinds of conversation in one padded batch of ours; the reference sees each alone, and then the same padded batch."""
    config = as_reference(CASES[name])
    torch_side = torch_model(config)
    model = with_params(config, FLOAT32, jax.tree.map(jnp.asarray, params_of(torch_side, config)))
    examples = [make_example(config, grids, seed) for seed, grids in enumerate(KINDS.values())]
    logits, hidden = run(model, jax.tree.map(jnp.asarray, collate([[example] for example in examples], config)))
    padded_logits, padded_hidden = reference(torch_side, torch_inputs(examples, config))
    for row, example in enumerate(examples):
        n = len(example.tokens)
        alone_logits, alone_hidden = reference(torch_side, torch_inputs([example], config))
        for ours, padded, alone in zip((logits, *hidden), (padded_logits, *padded_hidden), (alone_logits, *alone_hidden), strict=True):
            np.testing.assert_allclose(ours[row, :n], alone[0], atol=1e-4, rtol=0)
            np.testing.assert_allclose(ours[row, :n], padded[row, :n], atol=1e-4, rtol=0)
        assert np.abs(alone_logits).max() > 1  # the bound means something at this scale


@pytest.mark.parametrize("kind", KINDS)
def test_alone_and_unpadded(kind: str) -> None:
    config = as_reference(CASES["plain"])
    torch_side = torch_model(config)
    model = with_params(config, FLOAT32, jax.tree.map(jnp.asarray, params_of(torch_side, config)))
    example = make_example(config, KINDS[kind], seed=7)
    logits = jax.jit(Mllm.__call__)(model, jax.tree.map(jnp.asarray, collate([[example]], config)))
    np.testing.assert_allclose(logits, reference(torch_side, torch_inputs([example], config))[0], atol=1e-4, rtol=0)


def test_far_positions() -> None:
    """Heads of 128 and positions up to the last: a frequency that is off in its last bit shows there and nowhere else."""
    decoder = replace(CASES["plain"].decoder, width=256, heads=2, kv_heads=1, mrope_section=(16, 24, 24), rope_theta=1e6)
    config = replace(CASES["plain"], decoder=decoder, vision=replace(CASES["plain"].vision, out_width=256))
    torch_side = torch_model(config)
    model = with_params(config, FLOAT32, jax.tree.map(jnp.asarray, params_of(torch_side, config)))
    batch = collate([[make_example(config, TEXT, seed=3, words=30)]], config)
    positions = batch.positions + np.array([120_000, 90_000, 70_000], np.int32)[None, :, None]
    ours = jax.jit(Mllm.__call__)(model, jax.tree.map(jnp.asarray, replace(batch, positions=positions)))
    with torch.no_grad():
        where = torch.tensor(positions).long().transpose(0, 1)
        theirs = torch_side(input_ids=torch.tensor(batch.tokens).long(), position_ids=where).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_packed_examples_never_see_each_other() -> None:
    """Rows that hold several examples give each what it gets alone, in both layouts of the pictures."""
    config = CASES["plain"]
    model = with_params(config, FLOAT32, jax.tree.map(jnp.asarray, params_of(torch_model(config), config)))
    examples = [make_example(config, grids, seed) for seed, grids in enumerate(KINDS.values())]
    alone = jax.jit(Mllm.__call__)(model, jax.tree.map(jnp.asarray, collate([[example] for example in examples], config)))
    rows = [[examples[0], examples[2], examples[1]], [examples[4], examples[3]]]
    for row_length in (None, 8 * config.vision.window_patches):
        packed = jax.jit(Mllm.__call__)(model, jax.tree.map(jnp.asarray, collate(rows, config, vision_row_length=row_length)))
        for i, row in enumerate(rows):
            start = 0
            for example in row:
                n = len(example.tokens)
                number = next(j for j, other in enumerate(examples) if other is example)
                np.testing.assert_allclose(packed[i, start : start + n], alone[number, :n], atol=1e-5, rtol=0)
                start += n


def loss(model: Mllm, batch: Batch) -> jax.Array:
    logits = jax.nn.log_softmax(model(batch))
    chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch.weights) / jnp.sum(batch.weights)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    config = as_reference(CASES[name])
    torch_side = torch_model(config)
    params = jax.tree.map(jnp.asarray, params_of(torch_side, config))
    examples = [make_example(config, grids, seed) for seed, grids in enumerate(KINDS.values())]
    batch = collate([[example] for example in examples], config)

    value, grads = jax.jit(jax.value_and_grad(lambda params, batch: loss(with_params(config, FLOAT32, params), batch)))(
        params, jax.tree.map(jnp.asarray, batch)
    )

    output = torch_side(**torch_inputs(examples, config)).logits
    chosen = torch.log_softmax(output, -1).gather(-1, torch.tensor(batch.targets).long()[..., None])[..., 0]
    expected = -(chosen * torch.tensor(batch.weights)).sum() / batch.weights.sum()
    expected.backward()
    assert abs(float(value) - expected.item()) < 1e-5

    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_of(torch_side, config)), strict=True):
        difference = np.linalg.norm(np.asarray(ours) - theirs)
        assert difference <= max(1e-3 * np.linalg.norm(theirs), 1e-6), jax.tree_util.keystr(path)
