"""Each shipped configuration as text: a change of what it does is a diff to read. `--update-golden` writes the text anew."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from blm_jax.config import BackboneConfig, ComputeConfig, MeshConfig, PolicyConfig
from blm_jax.configfile import load, load_as, render
from blm_jax.mesh import make_mesh
from blm_jax.models.mllm import Mllm, abstract_params
from blm_jax.recipe import Run
from blm_jax.train.outline import outline

ROOT = Path(__file__).parent.parent
MODELS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
HARDWARE = sorted((ROOT / "configs" / "hardware").glob("*.yaml"))
TRAIN = sorted((ROOT / "configs" / "train").glob("*.yaml"))
MESH = MeshConfig(data=2, fsdp=2, tensor=2)  # every axis divides something


def compare(request: pytest.FixtureRequest, file: Path, text: str) -> None:
    golden = ROOT / "tests" / "golden" / file.relative_to(ROOT / "configs").with_suffix(".txt")
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), f"{golden} is missing: run pytest with --update-golden and read the diff"
    assert text == golden.read_text()


def describe_params(config: BackboneConfig) -> str:
    """Shape, logical axes and place on the mesh of each parameter."""
    params = abstract_params(config, mesh=make_mesh(MESH))
    model = nnx.eval_shape(lambda: Mllm(config, ComputeConfig(), rngs=nnx.Rngs(0)))
    axes = {path: param.axes for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    leaves = jax.tree.leaves_with_path(params)
    lines = [f"parameters on a mesh of {MESH.data} x {MESH.fsdp} x {MESH.tensor} (data x fsdp x tensor):"]
    for keys, leaf in leaves:
        path = tuple(key.key for key in keys)
        logical = ", ".join(str(axis) for axis in axes[path])
        lines.append(f"{'.'.join(path)}: {list(leaf.shape)} ({logical}) on {tuple(leaf.sharding.spec)}")
    lines.append(f"in all: {sum(math.prod(leaf.shape) for _, leaf in leaves)}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_models(file: Path, request: pytest.FixtureRequest) -> None:
    config = load(file).model
    compare(request, file, f"{render(config)}\n{describe_params(config)}")


@pytest.mark.parametrize("file", HARDWARE, ids=lambda file: file.stem)
def test_hardware(file: Path, request: pytest.FixtureRequest) -> None:
    compare(request, file, render(load(MODELS[0], file).hardware))


@pytest.mark.parametrize("file", TRAIN, ids=lambda file: file.stem)
def test_runs(file: Path, request: pytest.FixtureRequest) -> None:
    """Every field, and what is trained and what is frozen."""
    run = load_as(Run, file)
    two, policy, backbone = run.stage_two, None, run.model
    if two is not None:
        policy = two.policy or replace(PolicyConfig(), robots=(*PolicyConfig().robots, two.only))
        backbone = None if two.intents else backbone
    found = outline(run, make_mesh(MESH), backbone, policy)
    compare(request, file, f"{render(run)}\n{found.describe()}\n")


def test_every_golden_file_has_its_configuration() -> None:
    golden = ROOT / "tests" / "golden"
    kept = {file.relative_to(golden).with_suffix("") for folder in ("model", "hardware", "train") for file in (golden / folder).glob("*")}
    assert kept == {file.relative_to(ROOT / "configs").with_suffix("") for file in MODELS + HARDWARE + TRAIN}
