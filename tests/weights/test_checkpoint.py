"""The orbax form: stock orbax reads what we write, and we read what stock orbax writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import SingleDeviceSharding

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig
from blm_jax.convert.command import convert
from blm_jax.errors import RequestError
from blm_jax.models.mllm import abstract_params
from blm_jax.weights import checkpoint, names
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.load import load_params
from blm_jax.weights.source import assets_dir, open_source, read_config
from tests.models.oracle import CASES, params_of
from tests.weights.hub_dirs import assert_same_tensors, read_tensors, save_hub, snapshot, write_tensors

CONFIG = CASES["plain"]
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tree]:
    """A Hub directory in bfloat16, the checkpoint we made of it, and its parameters."""
    folder = tmp_path_factory.mktemp("model")
    wanted = params_of(save_hub(folder / "hub", CONFIG, torch.bfloat16).float(), CONFIG)
    with pytest.MonkeyPatch.context() as patch:  # so that arrays have several files and these several tiles
        patch.setattr(names, "PIECE_BYTES", 3000)
        patch.setattr(checkpoint, "_INNER_BYTES", 1024)
        convert(folder / "hub", folder / "checkpoint", "checkpoint")
    return folder / "hub", folder / "checkpoint", jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)


def assert_equal(found: Tree, wanted: Tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        bits, wanted_bits = (np.ascontiguousarray(value).view(np.uint8) for value in (a, b))
        assert a.dtype == b.dtype and np.array_equal(bits, wanted_bits), jax.tree_util.keystr(path)


def on_mesh(*sizes: int) -> Tree:
    return abstract_params(CONFIG, jnp.bfloat16, meshes.make_mesh(MeshConfig(*sizes)))


def test_stock_orbax_restores_it_whole(model: tuple[Path, Path, Tree]) -> None:
    assert_equal(ocp.StandardCheckpointer().restore(model[1] / "params"), model[2])
    assert_equal(ocp.PyTreeCheckpointer().restore(model[1] / "params"), model[2])


def test_stock_orbax_restores_it_onto_a_mesh(model: tuple[Path, Path, Tree]) -> None:
    abstract = on_mesh(1, 4, 2)
    composite = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    for found in (
        ocp.StandardCheckpointer().restore(model[1] / "params", abstract),
        composite.restore(model[1], args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"],
    ):
        assert_equal(found, model[2])
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract)


def test_we_load_it_onto_a_mesh(model: tuple[Path, Path, Tree]) -> None:
    assert read_config(model[1]) == CONFIG
    assert_equal(load_params(model[1], on_mesh(2, 2, 2)), model[2])
    as_float = load_params(model[1], abstract_params(CONFIG))
    assert_equal(as_float, jax.tree.map(lambda x: x.astype(np.float32), model[2]))
    two = {"decoder": {"blocks": {"down": {"kernel": jax.ShapeDtypeStruct((2, 96, 64), jnp.bfloat16)}}}}
    down = model[2]["decoder"]["blocks"]["down"]["kernel"][:2]
    assert_equal(load_params(model[1], two), {"decoder": {"blocks": {"down": {"kernel": down}}}})


def test_a_stack_is_many_files_and_each_is_tiles(model: tuple[Path, Path, Tree]) -> None:
    array = open_source(model[1]).arrays[("decoder", "blocks", "gate", "kernel")]  # pyright: ignore
    assert array.shape == (3, 64, 96)
    assert array.chunk_layout.write_chunk.shape == (1, 64, 16) and array.chunk_layout.read_chunk.shape == (1, 32, 16)
    assert not any(path.stat().st_size > 4000 for path in (model[1] / "params").rglob("c/**/*") if path.is_file())


def save_live(directory: Path, hub: Path, params: Tree, save: Any) -> None:
    """As training saves: stock orbax, from arrays on devices; config.json beside it."""
    save(directory / "params", params)
    (directory / "assets").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(hub / name, directory / "assets")


def standard(path: Path, params: Tree) -> None:
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, params)


def plain_zarr(path: Path, params: Tree, *, zarr3: bool) -> None:
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=zarr3)).save(path, args=ocp.args.PyTreeSave(params))


SAVERS = {
    "standard": standard,
    "zarr": lambda path, params: plain_zarr(path, params, zarr3=False),
    "zarr3": lambda path, params: plain_zarr(path, params, zarr3=True),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_what_stock_orbax_saved_loads_and_converts(kind: str, model: tuple[Path, Path, Tree], tmp_path: Path) -> None:
    hub, _, params = model
    live = load_params(hub, on_mesh(1, 4, 2))
    save_live(tmp_path / "live", hub, live, SAVERS[kind])
    assert assets_dir(tmp_path / "live") == tmp_path / "live" / "assets"
    assert_equal(load_params(tmp_path / "live", on_mesh(8, 1, 1)), params)
    assert_equal(load_params(tmp_path / "live", on_mesh(2, 2, 2)), params)
    convert(tmp_path / "live", tmp_path / "back", "hf", max_shard_bytes=10**5)
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hub))
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()
    convert(tmp_path / "live", tmp_path / "ours", "checkpoint")
    assert fingerprint(tmp_path / "ours") == fingerprint(tmp_path / "live") == fingerprint(hub)


def test_an_array_in_one_large_chunk_is_read_by_one_reader(
    model: tuple[Path, Path, Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_one = jax.device_put(model[2], SingleDeviceSharding(jax.devices()[0]))
    save_live(tmp_path / "live", model[0], on_one, standard)
    assert open_source(tmp_path / "live").readers() == 4
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 4000)
    assert open_source(tmp_path / "live").readers() == 1
    assert_equal(load_params(tmp_path / "live", on_mesh(2, 2, 2)), model[2])


def test_every_bit_survives(tmp_path: Path) -> None:
    """NaNs with a payload, negative zeros, tensors all zero; and dtypes mixed within a stack, which an array cannot hold."""
    tensors = {name: value.detach() for name, value in save_hub(tmp_path / "hub", CASES["tied"], torch.bfloat16).state_dict().items()}
    del tensors["lm_head.weight"]
    tensors = {name.replace("model.visual", "visual").replace("model.language_model", "model"): value for name, value in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    for number, (name, value) in enumerate(sorted(tensors.items())):
        bits = torch.randint(0, 2**15, value.shape, generator=generator, dtype=torch.int16)
        tensors[name] = torch.where(bits % 2 == 0, bits, -bits - 1).view(torch.bfloat16)
        if number % 5 == 0:
            tensors[name] = torch.zeros(value.shape, dtype=torch.bfloat16) * (-1 if number % 2 else 1)
        if (number * number) % 7 == 1:
            tensors[name] = torch.randn(value.shape, generator=generator)
    assert any(value.isnan().any() for value in tensors.values())
    dtypes = {tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].dtype for layer in range(3)}
    assert dtypes == {torch.float32, torch.bfloat16}
    write_tensors(tmp_path / "hub", tensors)
    convert(tmp_path / "hub", tmp_path / "checkpoint", "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "again", "checkpoint")
    convert(tmp_path / "again", tmp_path / "back", "hf")
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    assert len({fingerprint(tmp_path / name) for name in ("hub", "checkpoint", "again", "back")}) == 1


def break_tree(directory: Path) -> None:
    (directory / "params" / "_METADATA").unlink()


def drop_array(directory: Path) -> None:
    path = directory / "params" / "_METADATA"
    tree = json.loads(path.read_text())
    del tree["tree_metadata"]["('decoder', 'norm', 'scale')"]
    path.write_text(json.dumps(tree))


def lose_array(directory: Path) -> None:
    shutil.rmtree(directory / "params" / "decoder.norm.scale")


def damage_array(directory: Path) -> None:
    file = min(path for path in (directory / "params" / "decoder.blocks.gate.kernel").rglob("c/**/*") if path.is_file())
    file.write_bytes(file.read_bytes()[:100])


def lose_file(directory: Path) -> None:
    min(path for path in (directory / "params" / "decoder.blocks.gate.kernel").rglob("c/**/*") if path.is_file()).unlink()


def reshape_model(directory: Path) -> None:
    path = directory / "assets" / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["intermediate_size"] = 97
    path.write_text(json.dumps(raw))


BAD = {
    "unfinished": (break_tree, "is no finished checkpoint"),
    "array not in the tree": (drop_array, "decoder.norm.scale is missing"),
    "array gone": (lose_array, "decoder.norm.scale cannot be read"),
    "file cut": (damage_array, "decoder.blocks.gate.kernel is damaged"),
    "file gone": (lose_file, "decoder.blocks.gate.kernel is damaged"),  # and not zeros
    "misshapen": (reshape_model, "decoder.blocks.gate.kernel has shape [3, 64, 96], config.json makes it [3, 64, 97]"),
    "no config": (lambda directory: (directory / "assets" / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_in_one_line(name: str, model: tuple[Path, Path, Tree], tmp_path: Path) -> None:
    damage, message = BAD[name]
    source = tmp_path / "source"
    shutil.copytree(model[1], source)
    damage(source)
    for read in (lambda: load_params(source, abstract_params(CONFIG)), lambda: convert(source, tmp_path / "out", "hf")):
        with pytest.raises(RequestError) as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_same_weights_give_the_same_files(model: tuple[Path, Path, Tree], tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(model[0], tmp_path / name, "checkpoint")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_the_fingerprint_is_of_the_weights(model: tuple[Path, Path, Tree], tmp_path: Path) -> None:
    """Another value, name or dtype is another fingerprint; files and forms are not: see the other tests."""
    tensors = read_tensors(model[0])
    prints = {fingerprint(model[0])}
    save_hub(tmp_path / "hub", CONFIG)
    for change in ({"model.norm.weight": -tensors["model.norm.weight"]}, {"model.norm.weight": tensors["model.norm.weight"].half()}):
        write_tensors(tmp_path / "hub", tensors | change)
        prints.add(fingerprint(tmp_path / "hub"))
    write_tensors(tmp_path / "hub", tensors | {"model.layers.0.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"]})
    prints.add(fingerprint(tmp_path / "hub"))
    assert len(prints) == 4 and all(value.startswith("sha256:") and len(value) == 71 for value in prints)
    write_tensors(tmp_path / "hub", tensors)
    assert fingerprint(tmp_path / "hub") in prints
