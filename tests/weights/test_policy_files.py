"""policy/ of a MODEL: bit for bit both ways, whole or not at all, and refused in one line where it is not what it says."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blm_jax.config import MeshConfig, PolicyConfig
from blm_jax.convert.command import convert
from blm_jax.convert.twin.blm_policy import BLMPolicy
from blm_jax.errors import RequestError, RunError
from blm_jax.mesh import make_mesh
from blm_jax.models.policy import abstract_policy
from blm_jax.weights import policy as files_module
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.policy import (
    PolicyFiles,
    check_policy,
    load_policy_params,
    new_policy,
    read_policy,
    table,
    with_robot,
    write_policy,
)
from tests.convert.policy_dirs import make_files
from tests.models.oracle import CASES
from tests.models.policies import SMALL, small
from tests.weights.hub_dirs import save_hub, snapshot

CONFIGS = {
    "small": SMALL,
    "no places, two robots": replace(SMALL, robots=("xarm7", "panda"), bridge=replace(SMALL.bridge, places=False)),
    "diffusion": small(objective=dict(path="ddim", prefix=2)),
}


@functools.cache
def abstract(config: PolicyConfig, mesh: Any = None) -> dict[str, Any]:
    return abstract_policy(config, mesh=mesh)


def random_params(config: PolicyConfig, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract(config))


def assert_same_bits(found: Any, wanted: Any) -> None:
    def same(path: Any, one: Any, other: Any) -> None:
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype and one.shape == other.shape, path
        assert one.tobytes() == other.tobytes(), path

    jax.tree_util.tree_map_with_path(same, found, wanted)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(SMALL, seed=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, params: dict[str, Any]) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_policy(directory / "policy", make_files(SMALL), params)
    return directory


@pytest.fixture
def model(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "model"))


# --- both ways -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Through our reader, and through the reader and writer that others use."""
    config = CONFIGS[name]
    files, params = make_files(config), random_params(config, seed=4)
    write_policy(tmp_path / "policy", files, params)
    assert read_policy(tmp_path) == files
    assert sorted(snapshot(tmp_path)) == ["policy/blm_policy.py", "policy/config.json", "policy/model.safetensors"]
    assert_same_bits(load_policy_params(tmp_path, abstract(config)), params)
    twin = BLMPolicy.from_pretrained(tmp_path / "policy")
    save_file(twin.state_dict(), tmp_path / "policy" / "model.safetensors")
    assert_same_bits(load_policy_params(tmp_path, abstract(config)), params)


def test_the_same_policy_gives_the_same_files(written: Path, params: dict[str, Any], tmp_path: Path) -> None:
    write_policy(tmp_path / "policy", make_files(SMALL), params)
    assert snapshot(tmp_path) == snapshot(written)


def test_names_and_shapes_are_those_of_the_model_and_of_the_module() -> None:
    for config in (*CONFIGS.values(), PolicyConfig()):
        entries = table(config)
        ours = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config))}
        assert {path: entry.shape for path, entry in entries.items()} == ours
        with torch.device("meta"):
            theirs = BLMPolicy(config, {}).state_dict()
        assert {tensor.name: entry.hub_shape for entry in entries.values() for tensor in entry.tensors()} == {
            name: tuple(value.shape) for name, value in theirs.items()
        }


def test_a_matrix_is_what_pytorch_would_have(written: Path, params: dict[str, Any]) -> None:
    """By hand, for one of each kind."""
    stored = load_file(written / "policy" / "model.safetensors")
    layer = params["dit"]["pairs"]["own"]["layer"]
    for i in range(2):
        q, out = np.asarray(layer["q"]["kernel"][i]), np.asarray(layer["out"]["kernel"][i])  # [width, heads, dim], [heads, dim, width]
        np.testing.assert_array_equal(stored[f"dit.pairs.{i}.own.layer.q.weight"], q.reshape(40, 40).T)
        np.testing.assert_array_equal(stored[f"dit.pairs.{i}.own.layer.out.weight"], out.reshape(40, 40).T)
        np.testing.assert_array_equal(stored[f"dit.pairs.{i}.own.layer.q.bias"], np.asarray(layer["q"]["bias"][i]).reshape(40))
    np.testing.assert_array_equal(stored["embodiments.action_timed.weight"], params["embodiments"]["action_timed"]["kernel"])
    np.testing.assert_array_equal(stored["bridge.norm.weight"], params["bridge"]["norm"]["scale"])
    np.testing.assert_array_equal(stored["bridge.places.cameras"], params["bridge"]["places"]["cameras"])


def test_dtypes_are_kept_in_files_and_cast_when_asked(params: dict[str, Any], tmp_path: Path) -> None:
    mixed = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(jnp.bfloat16) if "kernel" in str(path[-1]) else leaf, params)
    write_policy(tmp_path / "policy", make_files(SMALL), mixed)
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    assert {value.dtype for name, value in stored.items() if "modulate.weight" in name} == {torch.bfloat16}
    assert_same_bits(load_policy_params(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mixed)), mixed)
    wide = load_policy_params(tmp_path, abstract(SMALL))
    assert_same_bits(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mixed))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_on_a_mesh(shape: tuple[int, int, int], written: Path, params: dict[str, Any], tmp_path: Path) -> None:
    wanted = abstract(SMALL, mesh=make_mesh(MeshConfig(*shape)))
    loaded = load_policy_params(written, wanted)
    assert_same_bits(loaded, params)
    jax.tree.map(lambda one, other: one.sharding == other.sharding or pytest.fail("another sharding"), loaded, wanted)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded))
    write_policy(tmp_path / "policy", make_files(SMALL), loaded)
    assert snapshot(tmp_path) == snapshot(written)


def test_it_travels_with_the_backbone(written: Path, tmp_path: Path) -> None:
    save_hub(tmp_path / "hub", CASES["plain"])
    shutil.copytree(written / "policy", tmp_path / "hub" / "policy")
    (tmp_path / "hub" / "policy" / "__pycache__").mkdir()
    there = convert(tmp_path / "hub", tmp_path / "checkpoint", "checkpoint")
    back = convert(tmp_path / "checkpoint", tmp_path / "back", "hf")
    assert there["fingerprint"] == back["fingerprint"] and back["files"] == len(snapshot(tmp_path / "back"))
    for form in ("checkpoint", "back"):
        assert snapshot(tmp_path / form / "policy") == snapshot(written / "policy")
        assert read_policy(tmp_path / form) == make_files(SMALL)
    (tmp_path / "hub" / "policy" / "model.safetensors").write_bytes(b"half of it")
    with pytest.raises(RequestError, match="truncated or no safetensors file"):
        convert(tmp_path / "hub", tmp_path / "again", "checkpoint")
    assert not (tmp_path / "again").exists()


# --- robots -------------------------------------------------------------------------------------------------------------------------


def test_a_new_policy(tmp_path: Path) -> None:
    """Before any training, beside a backbone, with a row for each robot that is asked for."""
    config = replace(SMALL, robots=("xarm7", "panda"), intent_width=64)
    known = make_files(config)
    save_hub(tmp_path / "hub", CASES["plain"])
    new_policy(tmp_path / "hub", config, known.robots, {"panda": known.statistics["panda"]}, seed=3)
    files = read_policy(tmp_path / "hub")
    wanted = PolicyFiles(config, known.robots, {"panda": known.statistics["panda"]}, fingerprint(tmp_path / "hub"))
    assert files == wanted and list(files.robots) == ["xarm7", "panda"]
    params = load_policy_params(tmp_path / "hub", abstract(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # Time is silent at first, and chunks are near their mean.
        names = [key.key for key in path]
        kernel = (0, 0) if "modulate" in names else (0.002, 0.1) if "decode_outer" in names else (0.02, 1)
        bounds = {"scale": (0, 0), "bias": (0, 0), "kernel": kernel}.get(names[-1], (0.4, 0.6))  # the others are tokens
        assert bounds[0] <= np.std(leaf) <= bounds[1], path
    # What comes out of a product is as large as what goes in.
    for name, inputs in (("up", config.dit.width), ("down", config.dit.ffn)):
        kernel = params["dit"]["pairs"]["own"]["layer"][name]["kernel"]
        assert 0.9 < np.std(kernel) * inputs**0.5 < 1.1, name
    assert list(BLMPolicy.from_pretrained(tmp_path / "hub" / "policy").robots) == ["panda"]
    assert files.find("panda") == known.robots["panda"]
    with pytest.raises(RequestError, match="has a row for xarm7, but was not trained for it: it drives panda"):
        files.find("xarm7")
    with pytest.raises(RequestError, match="no row for the robot 'pand'; did you mean panda"):
        files.find("pand")
    with pytest.raises(RequestError, match="intent_block is 0: it counts blocks from the bottom, the lowest is 1"):
        replace(config, intent_block=0)
    with pytest.raises(RequestError, match="policy exists; choose another directory"):
        new_policy(tmp_path / "hub", config, known.robots, {})
    shutil.rmtree(tmp_path / "hub" / "policy")
    for wrong, says in (
        (replace(config, intent_block=4), "reads block 4 of a backbone 64 wide, but this one has 3 blocks and is 64 wide"),
        (replace(config, intent_width=24), "a backbone 24 wide, but this one"),
        (replace(config, robots=("panda",)), "the policy is of the robots panda, but described are xarm7, panda"),
    ):
        with pytest.raises(RequestError, match=says):
            new_policy(tmp_path / "hub", wrong, known.robots, {})
    assert not (tmp_path / "hub" / "policy").exists()


def test_a_contract_with_one_robot_more() -> None:
    files = make_files(replace(SMALL, robots=("panda", "xarm6")))
    more = make_files(SMALL)
    grown = with_robot(files, more.robots["widowxai"], more.statistics["widowxai"])
    assert grown.config.robots == tuple(grown.robots) == ("panda", "xarm6", "widowxai")
    assert grown.statistics["widowxai"] == more.statistics["widowxai"] and grown.backbone == files.backbone
    assert "widowxai" not in with_robot(files, more.robots["widowxai"]).statistics
    with pytest.raises(RequestError, match="must be different names"):
        with_robot(files, more.robots["panda"])
    with pytest.raises(RequestError, match="robot widowxai has chunks of 9 steps, the policy of 7"):
        with_robot(files, replace(more.robots["widowxai"], horizon=9))


# --- whole or not at all ---------------------------------------------------------------------------------------------------------


def test_what_exists_is_left_alone(written: Path, params: dict[str, Any]) -> None:
    before = snapshot(written)
    with pytest.raises(RequestError, match="policy exists; choose another directory or remove it"):
        write_policy(written / "policy", make_files(SMALL), params)
    assert snapshot(written) == before


def test_a_failure_on_the_way_leaves_nothing(params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".policy.partial").mkdir()  # of a run that was killed
    (tmp_path / ".policy.partial" / "half").write_text("")
    gather, calls = files_module._on_host, []

    def fail_later(leaf: Any) -> np.ndarray:
        calls.append(leaf)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return gather(leaf)

    monkeypatch.setattr(files_module, "_on_host", fail_later)
    with pytest.raises(RunError, match=r"writing .*policy failed: No space left on device"):
        write_policy(tmp_path / "policy", make_files(SMALL), params)
    assert not list(tmp_path.iterdir())


def test_in_a_bucket_the_contract_is_last(params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "is_local", lambda path: False)
    monkeypatch.setattr(files_module, "contract", lambda files: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_policy(tmp_path / "policy", make_files(SMALL), params)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(files_module, "is_local", lambda path: False)
    write_policy(tmp_path / "policy", make_files(SMALL), params)
    times = {path.stat().st_mtime_ns: path.name for path in (tmp_path / "policy").iterdir()}
    assert times[max(times)] == "config.json"


# --- what is refused -----------------------------------------------------------------------------------------------------------------


def test_no_policy(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no policy/: it answers questions, but was not trained to act"):
        read_policy(tmp_path)
    (tmp_path / "policy").mkdir()
    with pytest.raises(RequestError, match=r"config\.json is missing: what wrote the policy was stopped; write it again"):
        read_policy(tmp_path)


def spoil_statistics(said: Any) -> None:
    said["statistics"]["panda"]["state"]["mean"][0] += 1


def spoil_limits(said: Any) -> None:
    said["robots"][0]["state"][0]["low"] = "far"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda said: said.update(format=9), "its format is 9, but this release reads 1; export the policy again"),
        (lambda said: said.update(robot=[]), "robot: no such key; did you mean robots?"),
        (lambda said: said.pop("backbone"), "has no backbone; export the policy again"),
        (lambda said: said["policy"]["dit"].pop("tap"), "policy.dit.tap is missing; export the policy again"),
        (lambda said: said["policy"]["dit"].update(taps=2), "dit.taps: no such key; did you mean tap?"),
        (lambda said: said["policy"].update(robots=["panda"]), "the policy is of the robots panda, but described are panda, xarm6"),
        (lambda said: said["policy"]["embodiment"].update(state_width=7), "robot panda has 8 state dimensions"),
        (lambda said: said["policy"]["bridge"].update(cameras=1), "robot panda has 2 cameras, more than bridge.cameras 1"),
        (lambda said: said["robots"][0].update(horizon=5), "the statistics do not match robot panda: their horizon is 7, its horizon is 5"),
        (spoil_statistics, "the statistics of panda do not have the fingerprint written there"),
        (spoil_limits, "expected a number, found 'far'"),
    ],
)
def test_a_contract_that_is_wrong(spoil: Callable[[Any], None], message: str, model: Path) -> None:
    path = model / "policy" / "config.json"
    said = json.loads(path.read_text())
    spoil(said)
    path.write_text(json.dumps(said))
    with pytest.raises(RequestError, match=r"policy/config\.json") as caught:
        read_policy(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("dit.pairs.1.own.modulate.bias"), "dit.pairs.1.own.modulate.bias is missing; export the policy again"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), "more is not part of the policy that config.json describes"),
        (
            lambda tensors: tensors.update(future_tokens=torch.zeros(4, 40)),
            "future_tokens has shape [4, 40], config.json makes it [3, 40]; one is wrong",
        ),
    ],
)
def test_weights_that_are_wrong(spoil: Callable[[Any], None], message: str, model: Path) -> None:
    path = model / "policy" / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    for use in (check_policy, lambda model: load_policy_params(model, abstract(SMALL))):
        with pytest.raises(RequestError) as caught:
            use(model)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_cut_short(model: Path) -> None:
    path = model / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RequestError, match="is truncated"):
        check_policy(model)


def test_a_tree_of_another_config(written: Path, params: dict[str, Any], tmp_path: Path) -> None:
    other = replace(SMALL, horizon=8, bridge=replace(SMALL.bridge, places=False))
    with pytest.raises(RequestError, match=r"the tree lacks bridge.places.cameras, bridge.places.project.kernel; it is not of this"):
        load_policy_params(written, abstract(other))
    with pytest.raises(RequestError, match=r"action_places has shape \[8, 40\], the policy's config makes it \[7, 40\]"):
        load_policy_params(written, abstract(replace(SMALL, horizon=8)))
    with pytest.raises(RequestError, match=r"the parameters to be written: the tree has besides bridge.places.cameras"):
        write_policy(tmp_path / "policy", replace(make_files(SMALL), config=other), params)
    whole = params | {"future_tokens": params["future_tokens"].astype(jnp.int32)}
    with pytest.raises(RequestError, match="future_tokens is of dtype int32, not one of"):
        write_policy(tmp_path / "policy", make_files(SMALL), whole)
    assert not list(tmp_path.iterdir())


def test_the_contract_is_checked_where_it_is_made() -> None:
    files = make_files(SMALL)
    with pytest.raises(RequestError, match="described are panda, xarm6, xarm7"):
        PolicyFiles(files.config, {name: robot for name, robot in files.robots.items() if name != "widowxai"}, {}, files.backbone)
    some = {"panda": files.statistics["panda"]}
    assert PolicyFiles(files.config, files.robots, some, files.backbone).statistics == some  # a robot may have none yet
    with pytest.raises(RequestError, match="the statistics do not match robot panda"):
        PolicyFiles(files.config, files.robots, {"panda": files.statistics["xarm7"]}, files.backbone)
