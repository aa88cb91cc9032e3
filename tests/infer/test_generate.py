"""Generation against transformers, over batches, seeds and ways of looking."""

from __future__ import annotations

import re
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
from blm_jax.errors import RequestError
from blm_jax.infer import generate as generation
from blm_jax.infer.generate import Generator, bucket
from blm_jax.infer.session import for_serving
from blm_jax.mesh import make_mesh
from blm_jax.models.decoder import KeyValue
from blm_jax.models.mllm import abstract_params
from tests.models.chats import IMAGE, IMAGES, MIXED, TEXT, VIDEO, make_example, torch_inputs
from tests.models.oracle import CASES, params_of, torch_model

GRIDS = (TEXT, IMAGE, VIDEO, IMAGES, MIXED)
PROMPTS = 15
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
    programs: tuple[Any, Any] = (generation.prefill, generation.extend)
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


@pytest.mark.parametrize(("name", "penalty"), [*((name, 1.0) for name in CASES), ("tied", 1.3)])
def test_greedy_token_for_token(name: str, penalty: float) -> None:
    """Five kinds of prompts in one batch of ours, each alone for the reference: of 40 prompts at least 24 are clear throughout."""
    config = replace(CASES[name], video_positions="transformers-5.23")
    torch_side = torch_model(config)
    model = for_serving(config, ComputeConfig(), jax.tree.map(jnp.asarray, params_of(torch_side, config)))
    examples = [make_example(config, grids, seed=i, words=5 + 4 * i) for i, grids in enumerate(GRIDS)]
    sampling = SamplingConfig(max_new_tokens=NEW, repetition_penalty=penalty)
    ours = answers(Generator(model, None, config.tokens.pad), examples, sampling)
    clear = 0
    for row, example in zip(ours, examples, strict=True):
        theirs, gap = reference(torch_side, example, config, repetition_penalty=penalty)
        if gap > 1e-3:
            clear += 1
            np.testing.assert_array_equal(row, theirs)
    assert clear >= 3


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


def test_streams_do_not_disturb_each_other(generator: Generator, config: BackboneConfig, examples: list[Example]) -> None:
    """Two under way on different meshes, while the caller computes on its own device."""
    sampling = SamplingConfig(max_new_tokens=9)
    expected = answers(generator, examples[:2], sampling)
    mesh = make_mesh(MeshConfig(4, 1, 2))
    params = params_of(torch_model(config), config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, "float32", mesh))
    sharded = Generator(for_serving(config, ComputeConfig(), jax.device_put(params, shardings)), mesh, config.tokens.pad)
    streams = [one.stream(examples[:2], sampling, (), every=2) for one in (sharded, generator)]
    parts: list[list[np.ndarray]] = [[], []]
    for pair in zip(*streams, strict=True):
        assert meshes.current() is None and len(jnp.ones(3).sharding.device_set) == 1
        for collected, part in zip(parts, pair, strict=True):
            collected.append(part)
    for collected in parts:
        np.testing.assert_array_equal(np.concatenate(collected, axis=1), expected)


def test_no_mesh_gathers_the_head(config: BackboneConfig) -> None:
    """A decode step divides the vocabulary over the tensor axis: no device sees the whole of it, tied or not."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    for tied in (True, False):
        sizes = replace(config, decoder=replace(config.decoder, tied=tied))
        params = params_of(torch_model(sizes), sizes)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(sizes, "float32", mesh))
        model = for_serving(sizes, ComputeConfig(), jax.device_put(params, shardings))
        rows, room = 4, 128
        cache = tuple(KeyValue(*(jnp.zeros((rows, 2, room, 16)),) * 2) for _ in range(sizes.decoder.layers))
        with meshes.use(mesh):
            step = jax.jit(lambda m, *x: m.decode(*x))
            inputs = (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32), cache, jnp.int32(3), jnp.ones((rows, room), bool))
            program = str(step.lower(model, *inputs).compile().as_text())
        gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program)
        assert gathered  # the fsdp axis gathers weights
        width, vocab = str(sizes.decoder.width), str(sizes.decoder.vocab)
        assert not [shape for shape in gathered if {width, vocab} <= set(shape.split(","))]


def test_an_answer_ends_where_the_positions_do(config: BackboneConfig, reference_model: Any, examples: list[Example]) -> None:
    length = len(examples[0].tokens)
    short = replace(config, decoder=replace(config.decoder, max_positions=length + 5))
    model = for_serving(short, ComputeConfig(), jax.tree.map(jnp.asarray, params_of(reference_model, config)))
    generator = Generator(model, None, config.tokens.pad)
    assert answers(generator, examples[:1], SamplingConfig(max_new_tokens=10**9)).shape == (1, 5)
    with pytest.raises(RequestError, match="fills all"):
        answers(generator, examples[10:11], SamplingConfig())
    with pytest.raises(RequestError, match="every 0 tokens"):
        next(generator.stream(examples[:1], SamplingConfig(), (), every=0))
