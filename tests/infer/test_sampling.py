"""The ways to draw a token, against transformers' own processors and against the probabilities themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from blm_jax.config import SamplingConfig
from blm_jax.infer.sampling import choose, method_of

VOCAB = 50
DRAWS = 20_000


def frequencies(sampling: SamplingConfig, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    method, numbers = method_of(sampling, VOCAB)
    keys = jax.random.split(jax.random.key(sampling.seed), DRAWS)
    rows = jnp.broadcast_to(logits, (DRAWS, VOCAB))
    tokens = jax.jit(lambda keys, rows, seen: choose(rows, keys, seen, method, numbers))(keys, rows, jnp.broadcast_to(seen, rows.shape))
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(1.0, None, 1.0, 1.0), (0.6, None, 1.0, 1.0), (1.3, 7, 1.0, 1.0), (1.0, None, 0.7, 1.0), (0.9, 12, 0.8, 1.4), (1.0, 1, 1.0, 1.0)],
)
def test_drawn_as_often_as_the_reference_says(temperature: float, top_k: int | None, top_p: float, penalty: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, VOCAB).astype(np.float32)
    history = np.array([3, 8, int(logits.argmax())])
    seen = np.isin(np.arange(VOCAB), history)
    drawn = frequencies(SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty), logits, seen)

    scores = torch.tensor(logits)[None]
    processors = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k or VOCAB),
        TopPLogitsWarper(top_p),
    ]
    for processor in processors:
        scores = processor(torch.tensor(history)[None], scores)
    expected = torch.softmax(scores, -1)[0].numpy()

    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
    assert np.abs(drawn - expected).max() < 5 * np.sqrt(0.25 / DRAWS)


def test_greedy_takes_the_likeliest() -> None:
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)
    drawn = frequencies(SamplingConfig(temperature=0.0, repetition_penalty=1.0), logits, np.zeros(VOCAB, bool))
    assert drawn[logits.argmax()] == 1
