"""Hub directories onto devices: every value, no byte too many, no device with too much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig
from blm_jax.errors import RequestError
from blm_jax.models.mllm import abstract_params
from blm_jax.weights import hub, load, names, safetensors_file
from blm_jax.weights.hub import HubSource
from blm_jax.weights.load import load_params
from blm_jax.weights.source import Source, open_source, read_config
from tests.models.oracle import CASES, params_of
from tests.weights.hub_dirs import read_tensors, save_hub, write_tensors

CONFIG = CASES["plain"]


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(np.asarray(a, np.float32), b), jax.tree_util.keystr(path)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """The sources that `load_params` opens, with what was read of them."""
    sources: list[Source] = []
    monkeypatch.setattr(load, "open_source", lambda path, backbone: sources.append(open_source(path, backbone)) or sources[-1])
    return sources


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("plain")
    return directory, params_of(save_hub(directory, CONFIG, shard="100KB"), CONFIG)


@pytest.mark.parametrize("case", CASES)
def test_loads_what_transformers_saved(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    wanted = params_of(save_hub(tmp_path, config, shard="100KB" if config.decoder.tied else "50GB"), config)
    assert read_config(tmp_path) == config
    assert_equal(load_params(tmp_path, abstract_params(config)), wanted)


def test_small_pieces_and_buckets_give_the_same(plain: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "PIECE_BYTES", 1000)
    assert_equal(load_params(plain[0], abstract_params(CONFIG)), plain[1])
    monkeypatch.setattr(safetensors_file, "is_local", lambda path: False)
    assert_equal(load_params(plain[0], abstract_params(CONFIG)), plain[1])


def test_bfloat16_and_casts_are_pytorchs(tmp_path: Path, plain: tuple[Path, dict[str, Any]]) -> None:
    model = save_hub(tmp_path, CONFIG, torch.bfloat16)
    wanted = params_of(model.float(), CONFIG)
    for directory in (tmp_path, plain[0]):  # stored so, and cast from float32 while loading
        found = load_params(directory, abstract_params(CONFIG, jnp.bfloat16))
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
        assert_equal(found, wanted)


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 2, 2)])
def test_a_mesh_gets_its_shards_and_no_device_a_whole(
    sizes: tuple[int, ...], plain: tuple[Path, dict[str, Any]], opened: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, fsdp, tensor = (1, *sizes)[-3:]
    mesh = meshes.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    abstract = abstract_params(CONFIG, mesh=mesh)
    held: list[int] = []  # bytes on the host at a time
    fill = HubSource.fill
    monkeypatch.setattr(HubSource, "fill", lambda *arguments: held.append(arguments[3].nbytes) or fill(*arguments))
    found = load_params(plain[0], abstract)
    assert_equal(found, plain[1])
    unique = 0
    for (path, array), wanted in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(abstract), strict=True):
        assert array.sharding == wanted.sharding
        shard = math.prod(wanted.sharding.shard_shape(array.shape))
        assert all(part.data.size == shard for part in array.addressable_shards)
        if path[-1].key in ("kernel", "embedding"):
            parts = fsdp if path[1].key == "patch_embed" else fsdp * tensor  # it is on the tensor axis in no dimension
            assert shard * parts == array.size, path
        unique += array.nbytes
    assert opened[0].count.read == unique  # a replicated slice is read once
    assert max(held) == max(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(abstract))


def test_only_what_is_asked_for_is_read(plain: tuple[Path, dict[str, Any]], opened: list[Source]) -> None:
    def first(tree: dict[str, Any], count: int) -> dict[str, Any]:
        return {key: first(value, count) if isinstance(value, dict) else value[:count] for key, value in tree.items()}

    wanted = {
        "decoder": {"embed": plain[1]["decoder"]["embed"], "blocks": first(plain[1]["decoder"]["blocks"], 2)},
        "vision": plain[1]["vision"],
    }
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    assert_equal(load_params(plain[0], abstract), wanted)
    assert opened[0].count.read == sum(leaf.nbytes for leaf in jax.tree.leaves(wanted))


@pytest.fixture(params=["plain", "tied"])
def rewritten(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Any, str]]:
    yield tmp_path, save_hub(tmp_path, CASES[request.param]), request.param


def test_names_that_transformers_uses_in_memory(rewritten: tuple[Path, Any, str]) -> None:
    directory, model, case = rewritten
    write_tensors(directory, model.state_dict())  # with a head even where it is tied
    assert "model.language_model.norm.weight" in read_tensors(directory) and "lm_head.weight" in read_tensors(directory)
    assert_equal(load_params(directory, abstract_params(CASES[case])), params_of(model, CASES[case]))


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    tensors = {name: value.detach() for name, value in save_hub(tmp_path, CASES["tied"]).state_dict().items()}
    head = tensors["lm_head.weight"].clone()
    head[-1, -1] += 1
    write_tensors(tmp_path, tensors | {"lm_head.weight": head})
    with pytest.raises(RequestError, match=r"lm_head\.weight is not the embedding"):
        load_params(tmp_path, abstract_params(CASES["tied"]))


def test_another_model_than_the_one_asked_for(plain: tuple[Path, dict[str, Any]]) -> None:
    wide = jax.ShapeDtypeStruct((9, 9), jnp.float32)
    with pytest.raises(RequestError, match=r"decoder.embed.embedding has shape \[320, 64\], but the model asked for wants \[9, 9\]"):
        load_params(plain[0], {"decoder": {"embed": {"embedding": wide}}})
    with pytest.raises(RequestError, match=r"no decoder\.bridge"):
        load_params(plain[0], {"decoder": {"bridge": wide}})
    with pytest.raises(RequestError, match="not a directory"):
        load_params(plain[0] / "config.json", {})


def test_the_table_of_names_is_the_models_tree() -> None:
    for config in CASES.values():
        shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
        assert shapes == {path: entry.shape for path, entry in names.table(config).items()}
    assert hub.INDEX == "model.safetensors.index.json"
