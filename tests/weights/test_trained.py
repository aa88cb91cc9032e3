"""A training checkpoint, and a run of them, as a MODEL: what was trained from it, what was frozen from its base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from blm_jax import mesh as meshes
from blm_jax.config import MeshConfig
from blm_jax.convert.command import convert
from blm_jax.convert.twin.blm_policy import BLMPolicy
from blm_jax.errors import RequestError
from blm_jax.models.mllm import abstract_params
from blm_jax.models.policy import abstract_policy
from blm_jax.train.checkpoints import Checkpoints
from blm_jax.weights import names, trained
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.hub import asset_names
from blm_jax.weights.load import load_params
from blm_jax.weights.policy import contract, has_policy, load_policy_params, read_policy
from blm_jax.weights.source import assets_dir, open_source, read_config
from blm_jax.weights.trained import describe_base
from tests.convert.policy_dirs import make_files, make_params
from tests.models.oracle import CASES, params_of
from tests.models.policies import SMALL
from tests.weights.hub_dirs import ASSETS, assert_same_tensors, read_tensors, save_hub, snapshot

CONFIG = CASES["plain"]
Tree = dict[str, Any]


def save(run: Path, step: int, on: Path, params: Tree, assets: dict[str, bytes] | None = None, **provenance: Any) -> Path:
    """As a run on this base does."""
    beside = assets_dir(on)
    own = {name: (beside / name).read_bytes() for name in asset_names(beside)} | (assets or {})
    said = {"base": describe_base(str(on), fingerprint(on)), "lora": None, **provenance}
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(step, jax.tree.map(jnp.asarray, params), {"step": jnp.int32(step)}, {"step": step}, own, said)
    return run / "checkpoints" / str(step)


def trained_params(base: Path, seed: int) -> Tree:
    """The decoder but for its embedding, with values that bfloat16 does not hold."""
    rng = np.random.default_rng(seed)
    whole = load_params(base, abstract_params(CONFIG))
    part = {"decoder": {key: value for key, value in whole["decoder"].items() if key != "embed"}}
    return jax.tree.map(lambda leaf: (np.asarray(leaf) + 0.01 * rng.standard_normal(leaf.shape)).astype(np.float32), part)


def assert_same_bits(found: Tree, wanted: Tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hub in bfloat16; one, a run of Stage I on it; two, a run of Stage II on the first."""
    folder = tmp_path_factory.mktemp("made")
    save_hub(folder / "hub", CONFIG, torch.bfloat16, shard="150KB")
    with pytest.MonkeyPatch.context() as patch:  # so that arrays have several chunks
        patch.setattr(names, "PIECE_BYTES", 3000)
        save(folder / "one", 10, folder / "hub", trained_params(folder / "hub", 10), stage=1)
        save(folder / "one", 20, folder / "hub", trained_params(folder / "hub", 20), stage=1)
        backbone = folder / "one" / "checkpoints" / "20"
        said = {"policy.json": json.dumps(contract(make_files(SMALL, fingerprint(backbone)))).encode()}
        save(folder / "two", 5, folder / "one", {"policy": make_params(SMALL)}, said, stage=2)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """To spoil; the hub is linked by the path it was trained on, or is not there at all."""
    return Path(shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copy2))


def step(folder: Path, run: str = "one", number: int = 20) -> Path:
    return folder / run / "checkpoints" / str(number)


# --- Stage I -----------------------------------------------------------------------------------------------------------------


def test_what_was_trained_is_its_own_and_the_rest_is_the_bases(made: Path) -> None:
    base, own = load_params(made / "hub", abstract_params(CONFIG)), trained_params(made / "hub", 20)
    wanted = {"decoder": {**base["decoder"], **own["decoder"]}, "vision": base["vision"]}
    assert read_config(step(made)) == CONFIG and (assets_dir(step(made)) / "merges.txt").read_bytes() == ASSETS["merges.txt"]
    assert_same_bits(load_params(step(made), abstract_params(CONFIG)), wanted)  # float32, none of it rounded
    on_mesh = abstract_params(CONFIG, jnp.float32, meshes.make_mesh(MeshConfig(2, 2, 2)))
    loaded = load_params(step(made), on_mesh)
    assert_same_bits(loaded, wanted)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == jax.tree.map(lambda leaf: leaf.sharding, on_mesh)
    two = {"decoder": {"blocks": {"down": {"kernel": jax.ShapeDtypeStruct((2, 96, 64), jnp.float32)}}}}
    assert_same_bits(
        load_params(step(made), two), {"decoder": {"blocks": {"down": {"kernel": own["decoder"]["blocks"]["down"]["kernel"][:2]}}}}
    )


def test_arrays_lie_in_pieces_of_single_layers(made: Path) -> None:
    array = open_source(step(made)).own.arrays["decoder", "blocks", "gate", "kernel"]  # pyright: ignore
    assert array.shape == (3, 64, 96) and array.chunk_layout.read_chunk.shape[0] == 1


def test_transformers_loads_the_export(made: Path, tmp_path: Path) -> None:
    """Of the base's dtypes; what was frozen is the base's, bit for bit."""
    done = convert(step(made), tmp_path / "hf", "hf", max_shard_bytes=100_000)
    loaded, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="auto")  # pyright: ignore
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")) and loaded.dtype == torch.bfloat16
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), trained_params(made / "hub", 20))
    base = load_params(made / "hub", abstract_params(CONFIG))
    wanted = {"decoder": {**base["decoder"], **rounded["decoder"]}, "vision": base["vision"]}
    assert_same_bits(params_of(loaded.float(), CONFIG), wanted)
    found, before = read_tensors(tmp_path / "hf"), read_tensors(made / "hub")
    kept = {name: value for name, value in before.items() if name.startswith(("visual.", "model.visual.")) or "embed" in name}
    assert_same_tensors({name: found[name] for name in kept}, kept)
    assert any(not torch.equal(found[name], value) for name, value in before.items() if "q_proj" in name)
    for name in ("config.json", *ASSETS):
        assert (tmp_path / "hf" / name).read_bytes() == (made / "hub" / name).read_bytes()
    assert done["fingerprint"] == fingerprint(tmp_path / "hf") == fingerprint(step(made)) and not (tmp_path / "hf" / "policy").exists()


def test_to_a_checkpoint_of_its_own(made: Path, tmp_path: Path) -> None:
    convert(step(made), tmp_path / "checkpoint", "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "hf", "hf")
    convert(step(made), tmp_path / "straight", "hf")
    assert_same_tensors(read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "straight"))


def test_a_run_is_its_newest_good_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert assets_dir(copy / "one") == assets_dir(step(copy))
    (step(copy) / "assets" / "merges.txt").write_text("other")
    assert assets_dir(copy / "one") == assets_dir(step(copy, number=10)) == assets_dir(copy / "one")
    said = capsys.readouterr().err
    assert said == f"blm: {step(copy)} is damaged: assets/merges.txt is not as it was written; passed over\n"
    with pytest.raises(RequestError, match=r"20 is damaged: assets/merges.txt is not as it was written; take another step's"):
        open_source(step(copy))
    (step(copy, number=10) / "commit_success.txt").unlink()
    with pytest.raises(RequestError, match=r"one/checkpoints has no checkpoint that is finished and not damaged"):
        read_config(copy / "one")
    with pytest.raises(RequestError, match=r"checkpoints/10 is no finished checkpoint"):
        open_source(step(copy, number=10))


# --- the base ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The MODELs that are read whole for their fingerprints."""
    seen: list[str] = []
    whole = trained.fingerprint_of
    monkeypatch.setattr(trained, "fingerprint_of", lambda source, **options: seen.append(str(source.assets())) or whole(source, **options))
    monkeypatch.setattr(trained, "_KNOWN", {})
    return seen


def test_a_base_that_lies_as_it_did_is_not_read_whole(made: Path, reads: list[str]) -> None:
    open_source(step(made))
    open_source(step(made, "two", 5))
    assert reads == []


def test_a_base_that_was_moved(made: Path, copy: Path, tmp_path: Path, reads: list[str]) -> None:
    """Found by the flag, read whole once, and named by the error without it."""
    checkpoint = save(tmp_path / "run", 1, copy / "hub", trained_params(copy / "hub", 1))
    os.rename(copy / "hub", copy / "elsewhere")
    with pytest.raises(
        RequestError, match=rf"was trained on {copy / 'hub'}: .* is not there; say where the base lies now with --backbone PATH"
    ):
        open_source(checkpoint)
    with pytest.raises(RequestError, match=r"nowhere is no directory; say where"):
        open_source(checkpoint, copy / "nowhere")
    reads.clear()
    for _ in range(2):
        found = load_params(checkpoint, abstract_params(CONFIG), copy / "elsewhere")
    assert_same_bits({"x": found["vision"]}, {"x": load_params(made / "hub", abstract_params(CONFIG))["vision"]})
    assert len(reads) <= 1
    done = convert(checkpoint, tmp_path / "hf", "hf", backbone=copy / "elsewhere")
    assert done["fingerprint"] == fingerprint(checkpoint, backbone=copy / "elsewhere")


def test_another_base_is_refused(made: Path, copy: Path, tmp_path: Path, reads: list[str]) -> None:
    checkpoint = save(tmp_path / "run", 1, copy / "hub", trained_params(copy / "hub", 1))
    path = next((copy / "hub").glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    os.utime(path, (1, 1))  # another time, the same bytes
    reads.clear()
    open_source(checkpoint)
    assert reads == [str(copy / "hub")]
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        RequestError, match=r"was trained on a base with fingerprint sha256:\w{16}..., but that of .*hub is sha256:\w{16}...: give"
    ):
        open_source(checkpoint)
    with pytest.raises(RequestError, match=r"but that of .*hub is sha256"):
        open_source(checkpoint, copy / "hub")
    open_source(checkpoint, made / "hub")
    with pytest.raises(RequestError, match=r"--backbone .*: .*hub is no training checkpoint, it holds all of its weights; leave it out"):
        open_source(made / "hub", made / "hub")


# --- Stage II ----------------------------------------------------------------------------------------------------------------


def test_a_policy_and_its_backbone(made: Path, tmp_path: Path) -> None:
    """Base upon base: the policy's backbone is a checkpoint of Stage I, whose frozen part is the hub's."""
    model = step(made, "two", 5)
    assert has_policy(model) and has_policy(made / "two") and not has_policy(step(made)) and not has_policy(made / "hub")
    assert read_policy(model) == make_files(SMALL, fingerprint(step(made))) and read_config(model) == CONFIG
    assert_same_bits(load_policy_params(model, abstract_policy(SMALL)), make_params(SMALL))
    mesh = meshes.make_mesh(MeshConfig(1, 8, 1))
    assert_same_bits(load_policy_params(made / "two", abstract_policy(SMALL, mesh=mesh)), make_params(SMALL))
    assert_same_bits(load_params(model, abstract_params(CONFIG)), load_params(step(made), abstract_params(CONFIG)))

    done = convert(made / "two", tmp_path / "hf", "hf")
    assert done["fingerprint"] == fingerprint(step(made)) == read_policy(tmp_path / "hf").backbone
    assert read_policy(tmp_path / "hf") == read_policy(model) and "policy.json" not in os.listdir(tmp_path / "hf")
    assert_same_bits(load_policy_params(tmp_path / "hf", abstract_policy(SMALL)), make_params(SMALL))
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf")
    twin = BLMPolicy.from_pretrained(tmp_path / "hf" / "policy")
    assert torch.equal(twin.state_dict()["action_places"], torch.from_numpy(make_params(SMALL)["action_places"]))


def test_the_flag_is_for_the_end_of_the_chain(copy: Path, tmp_path: Path) -> None:
    one = save(tmp_path / "one", 1, copy / "hub", trained_params(copy / "hub", 1))
    said = {"policy.json": json.dumps(contract(make_files(SMALL, fingerprint(one)))).encode()}
    two = save(tmp_path / "two", 1, tmp_path / "one", {"policy": make_params(SMALL)}, said)
    os.rename(copy / "hub", copy / "elsewhere")
    with pytest.raises(RequestError, match=rf"{one} was trained on {copy / 'hub'}"):
        open_source(two)
    found = load_params(two, abstract_params(CONFIG), copy / "elsewhere")
    assert_same_bits(found, load_params(one, abstract_params(CONFIG), copy / "elsewhere"))


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["one", "two"])
def test_damaged_values_are_never_exported(run: str, copy: Path, tmp_path: Path) -> None:
    model = step(copy, run, {"one": 20, "two": 5}[run])
    data = max((model / "params" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    data.write_bytes(raw)
    with pytest.raises(RequestError, match=r"is damaged[: (].*take another step's") as caught:
        convert(model, tmp_path / "hf", "hf")
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()


def test_what_is_not_read(made: Path, tmp_path: Path) -> None:
    own = trained_params(made / "hub", 1)
    for number, (params, said, says) in enumerate(
        (
            (own, {"lora": {"rank": 2}}, "provenance.json: lora must say rank, alpha and targets"),
            (own, {"base": None}, "provenance.json does not say on which base MODEL it was trained"),
            ({"decoder": {"other": np.ones(3, np.float32)}}, {}, r"params: decoder.other is not part of the model that assets/config.json"),
            (
                {"decoder": {"norm": {"scale": np.ones(3, np.float32)}}},
                {},
                r"params: decoder.norm.scale has shape \[3\], config.json makes it",
            ),
        )
    ):
        with pytest.raises(RequestError, match=says):
            open_source(save(tmp_path / str(number), 1, made / "hub", params, **said))  # pyright: ignore[reportArgumentType]
    files = {"policy.json": json.dumps(contract(make_files(SMALL))).encode()}
    half = {name: value for name, value in make_params(SMALL).items() if name != "dit"}
    with pytest.raises(RequestError, match=r"params: the tree lacks dit\..* it is not of this policy's config"):
        load_policy_params(save(tmp_path / "half", 1, made / "hub", {"policy": half}, files), abstract_policy(SMALL))


def test_opening_writes_nothing(copy: Path) -> None:
    before = snapshot(copy)
    open_source(copy / "two")
    read_policy(copy / "two")
    assert snapshot(copy) == before
