"""Generation against transformers, over batches, seeds and ways of looking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_jax import mesh as meshes
from blm_jax.config import BackboneConfig, ComputeConfig, MeshConfig, SamplingConfig
from blm_jax.data.prompt import Example
from blm_jax.infer import generate as generation
from blm_jax.infer.generate import Generator, bucket
from blm_jax.infer.session import for_serving
from blm_jax.mesh import make_mesh
from blm_jax.models.mllm import abstract_params
from tests.models.chats import IMAGE, IMAGES, MIXED, TEXT, VIDEO, make_example, torch_inputs
from tests.models.oracle import CASES, params_of, torch_model

GRIDS = (TEXT, IMAGE, VIDEO, IMAGES, MIXED)
PROMPTS = 30
NEW = 64


@pytest.fixture(scope="module")
def config() -> BackboneConfig:
    return replace(CASES["tied"], video_positions="transformers-5.23")


@pytest.fixture(scope="module")
def reference_model(config: BackboneConfig) -> Any:
    return torch_model(config)


@pytest.fixture(scope="module")
def generator(config: BackboneConfig, reference_model: Any) -> Generator:
    params = jax.tree.map(jnp.asarray, params_of(reference_model, config))
    return Generator(for_serving(config, ComputeConfig(), params), None, config.tokens.pad)


@pytest.fixture(scope="module")
def examples(config: BackboneConfig) -> list[Example]:
    return [make_example(config, GRIDS[i % len(GRIDS)], seed=i, words=5 + 2 * i) for i in range(PROMPTS)]


def answers(
    generator: Generator, examples: list[Example], sampling: SamplingConfig, stop: tuple[int, ...] = (), every: int | None = None
) -> np.ndarray:
    return np.concatenate(list(generator.stream(examples, sampling, stop, every)), axis=1)


def compiled() -> tuple[int, int]:
    """How many programs of each kind there are by now."""
    programs: tuple[Any, Any] = (generation._prefill, generation._extend)
    return programs[0]._cache_size(), programs[1]._cache_size()


def reference(model: Any, example: Example, config: BackboneConfig, **changes: float) -> tuple[np.ndarray, float]:
    """Greedy tokens of the reference, and the least distance between the two likeliest on the way."""
    output = model.generate(
        **torch_inputs([example], config),
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **changes,
    )
    best = torch.stack([torch.topk(score[0], 2).values for score in output.scores])
    return output.sequences[0, len(example.tokens) :].numpy(), float((best[:, 0] - best[:, 1]).min())


@pytest.mark.parametrize(("penalty", "wanted"), [(1.0, 20), (1.3, 4)])
def test_greedy_token_for_token(
    generator: Generator, config: BackboneConfig, reference_model: Any, examples: list[Example], penalty: float, wanted: int
) -> None:
    """All prompts in one batch of ours, each alone for the reference."""
    examples = examples if penalty == 1.0 else examples[:8]
    ours = answers(generator, examples, SamplingConfig(max_new_tokens=NEW, repetition_penalty=penalty))
    clear = 0
    for row, example in zip(ours, examples, strict=True):
        theirs, gap = reference(reference_model, example, config, repetition_penalty=penalty)
        if gap > 1e-3:
            clear += 1
            np.testing.assert_array_equal(row, theirs)
    assert clear >= wanted


def test_looking_often_changes_nothing(generator: Generator, examples: list[Example]) -> None:
    sampling = SamplingConfig(max_new_tokens=11, temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.0)
    whole = answers(generator, examples[:3], sampling)
    before = compiled()
    parts = list(generator.stream(examples[:3], sampling, (), every=3))
    assert [part.shape[1] for part in parts] == [1, 3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert compiled() == before  # the same compiled loop, told a nearer end


def test_numbers_of_sampling_compile_nothing(generator: Generator, examples: list[Example]) -> None:
    def draw(temperature: float, top_p: float, seed: int) -> np.ndarray:
        sampling = SamplingConfig(max_new_tokens=11, temperature=temperature, top_p=top_p, seed=seed, repetition_penalty=1.0)
        return answers(generator, examples[:3], sampling)

    first = draw(0.8, 0.9, 0)
    sizes = compiled()
    np.testing.assert_array_equal(draw(0.8, 0.9, 0), first)
    assert (draw(0.8, 0.9, 1) != first).any()
    assert (draw(2.0, 0.5, 0) != first).any()
    assert compiled() == sizes


def test_a_row_does_not_depend_on_those_beside_it(generator: Generator, examples: list[Example]) -> None:
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0, seed=3, repetition_penalty=1.0)
    together = answers(generator, examples[:4], sampling)
    np.testing.assert_array_equal(answers(generator, examples[:1], sampling), together[:1])


def test_a_stop_token_ends_its_row_alone(generator: Generator, config: BackboneConfig, examples: list[Example]) -> None:
    free = answers(generator, examples[:4], SamplingConfig(max_new_tokens=24, repetition_penalty=1.0))
    stop = int(free[1, 5])
    ended = answers(generator, examples[:4], SamplingConfig(max_new_tokens=24, repetition_penalty=1.0), stop=(stop,))
    for row, whole in zip(ended, free, strict=True):
        places = np.flatnonzero(whole == stop)
        end = places[0] + 1 if len(places) else len(whole)
        np.testing.assert_array_equal(row[:end], whole[: len(row)][:end])
        assert (row[end:] == config.tokens.pad).all()
    everything = tuple(range(config.decoder.vocab))
    assert answers(generator, examples[:2], SamplingConfig(max_new_tokens=24, repetition_penalty=1.0), stop=everything).shape == (2, 1)


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_sharded_equals_unsharded(
    generator: Generator, config: BackboneConfig, examples: list[Example], mesh_shape: tuple[int, int, int]
) -> None:
    mesh = make_mesh(MeshConfig(*mesh_shape))
    sampling = SamplingConfig(max_new_tokens=16, temperature=0.7, top_k=20, seed=1, repetition_penalty=1.0)
    expected = answers(generator, examples[:5], sampling)
    params = params_of(torch_model(config), config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, "float32", mesh))
    with meshes.use(mesh):
        sharded = Generator(for_serving(config, ComputeConfig(), jax.device_put(params, shardings)), mesh, config.tokens.pad)
    kernel = sharded.model.decoder.blocks[0].gate.kernel[...]  # pyright: ignore
    assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0] // mesh_shape[1], kernel.shape[1] // mesh_shape[2])
    np.testing.assert_array_equal(answers(sharded, examples[:5], sampling), expected)


@settings(max_examples=30)
@given(st.integers(1, 10**6))
def test_buckets(length: int) -> None:
    assert length <= bucket(length) <= max(64, 1.5 * length)
    assert bucket(bucket(length)) == bucket(length)
