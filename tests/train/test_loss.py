"""The loss in chunks is PyTorch's loss of all logits at once, its gradients too, and never holds them all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blm_jax.train.loss import cross_entropy

TOKENS, WIDTH, VOCAB = 37, 16, 101


def inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((TOKENS, WIDTH)), rng.standard_normal((WIDTH, VOCAB))
    weights = np.where(rng.random(TOKENS) > 0.6, 1.5, 0)
    return x.astype(np.float32), kernel.astype(np.float32), rng.integers(0, VOCAB, TOKENS), weights.astype(np.float32)


@pytest.mark.parametrize("chunk", [8, 37, 64])
def test_as_pytorch(chunk: int) -> None:
    x, kernel, targets, weights = inputs()
    x[-1], weights[-1] = np.nan, 0  # what padding holds may be anything
    theirs = [torch.tensor(np.nan_to_num(value), requires_grad=True) for value in (x, kernel)]
    each = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1], torch.tensor(targets), reduction="none")
    whole = 3 * (each * torch.tensor(weights)).sum()
    whole.backward()

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return 3 * cross_entropy(jnp.nan_to_num(x), kernel, targets, weights, True, chunk)[0]

    value, slopes = jax.value_and_grad(ours, (0, 1))(x, kernel)
    np.testing.assert_allclose(value, whole.item(), rtol=1e-6)
    for slope, parameter in zip(slopes, theirs, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(slope, parameter.grad, atol=2e-5)
    np.testing.assert_allclose(cross_entropy(x, kernel, targets, weights, True, chunk)[1][:-1], each[:-1].detach(), rtol=1e-5)
    np.testing.assert_allclose(ours(x, kernel), value, rtol=1e-6)  # without a gradient it is made another way


def test_a_frozen_head_has_no_slopes() -> None:
    x, kernel, targets, weights = inputs()
    slopes = jax.grad(lambda x, kernel: cross_entropy(x, kernel, targets, weights, False)[0], (0, 1))(x, kernel)
    assert jnp.abs(slopes[0]).max() > 0 and not slopes[1].any()


def test_all_logits_are_never_there() -> None:
    tokens, vocab, chunk = 512, 4096, 64
    x, kernel = jnp.zeros((tokens, 8)), jnp.zeros((8, vocab))
    targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
    step = jax.jit(jax.grad(lambda x, kernel: cross_entropy(x, kernel, targets, weights, True, chunk)[0], (0, 1)))
    program = str(step.lower(x, kernel).compile().as_text())
    assert f"f32[{chunk},{vocab}]" in program
    assert f"[{tokens},{vocab}]" not in program and f"[{tokens // chunk},{chunk},{vocab}]" not in program
