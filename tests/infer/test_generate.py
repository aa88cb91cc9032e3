"""Generation against transformers, over batches, seeds and ways of looking."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tests.models.chats import IMAGE, IMAGES, MIXED, TEXT, VIDEO, make_example, torch_inputs
from tests.models.oracle import CASES, params_of, torch_model

from blm_jax.config import BackboneConfig, ComputeConfig, SamplingConfig
from blm_jax.data.prompt import Example
from blm_jax.infer import generate as generation
from blm_jax.infer.generate import Generator, bucket
from blm_jax.infer.session import for_serving

GRIDS = (TEXT, IMAGE, VIDEO, IMAGES, MIXED)
PROMPTS = 30
NEW = 64


@pytest.fixture(scope="module")
def config() -> BackboneConfig:
    return replace(CASES["tied"], video_positions="transformers-5.23")


@pytest.fixture(scope="module")
def generator(config: BackboneConfig) -> Generator:
    params = jax.tree.map(jnp.asarray, params_of(torch_model(config), config))
    return Generator(for_serving(config, ComputeConfig(), params), None, config.tokens.pad)


@pytest.fixture(scope="module")
def examples(config: BackboneConfig) -> list[Example]:
    return [make_example(config, GRIDS[i % len(GRIDS)], seed=i, words=5 + 2 * i) for i in range(PROMPTS)]


def answers(generator: Generator, examples: list[Example], sampling: SamplingConfig, stop: tuple[int, ...] = (), every: int | None = None) -> np.ndarray:
    return np.concatenate(list(generator.stream(examples, sampling, stop, every)), axis=1)


def reference(config: BackboneConfig, example: Example, **changes: float) -> tuple[np.ndarray, float]:
    """Greedy tokens of the reference, and the least distance between the two likeliest on the way."""
    output = torch_model(config).generate(
        **torch_inputs([example], config),
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **changes,
    )
    best = torch.stack([torch.topk(score[0], 2).values for score in output.scores])
    return output.sequences[0, len(example.tokens) :].numpy(), float((best[:, 0] - best[:, 1]).min())


def test_greedy_token_for_token(generator: Generator, config: BackboneConfig, examples: list[Example]) -> None:
    ours = answers(generator, examples, SamplingConfig(max_new_tokens=NEW, repetition_penalty=1.0))
    clear = 0
    for row, example in zip(ours, examples, strict=True):
        theirs, gap = reference(config, example)
        if gap > 1e-3:
            clear += 1
            np.testing.assert_array_equal(row, theirs)
    assert clear >= 20
