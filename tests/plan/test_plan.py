"""Programs of runs, whole reports, and what is proposed where a program does not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from blm_jax import mesh as meshes
from blm_jax.batch import IntentRows, Prompts
from blm_jax.cli import main
from blm_jax.config import (
    BackboneConfig,
    BridgeConfig,
    ComputeConfig,
    DecoderConfig,
    DiTConfig,
    EmbodimentConfig,
    Experiment,
    HardwareConfig,
    MeshConfig,
    PolicyConfig,
    VisionConfig,
)
from blm_jax.configfile import render
from blm_jax.counts import decoder_operations, layer_weights, vision_operations
from blm_jax.data.demos.robots import load_robots
from blm_jax.errors import RequestError
from blm_jax.mesh import make_mesh
from blm_jax.plan import command, least, programs, rows
from blm_jax.plan.report import Plan, Program, examine, table
from blm_jax.plan.topology import describe
from blm_jax.recipe import LoraConfig, ModuleConfig, OptimizerConfig, Run, SetConfig, StageOneConfig, StageTwoConfig
from blm_jax.weights.names import leaves

BACKBONE = BackboneConfig(
    VisionConfig(layers=2, width=64, heads=2, ffn=96, out_width=128, full_attention_layers=(1,)),
    DecoderConfig(layers=2, width=128, heads=2, kv_heads=1, ffn=256, vocab=512, tied=False, mrope_section=(8, 12, 12)),
)
POLICY = PolicyConfig(
    intent_block=1,
    intent_width=128,
    horizon=16,
    bridge=BridgeConfig(queries=4, blocks=1, width=64, heads=2, ffn=128),
    dit=DiTConfig(layers=2, heads=2, head_dim=32, ffn=128, tap=2, time_features=32),
    embodiment=EmbodimentConfig(state_width=16, action_width=16, hidden=64),
)
ONE = Run(
    steps=10,
    batch=8,
    optimizer=OptimizerConfig(rate=1e-5),
    stage_one=StageOneConfig(corpora={"a": "1"}, length=512),
    hardware=HardwareConfig(mesh=MeshConfig(2, 2, 1), compute=ComputeConfig(dtype="bfloat16", remat="full")),
    model=BACKBONE,
)
STAGE_TWO = StageTwoConfig(sets=(SetConfig("x", "panda", "y"),), policy=POLICY)
TWO = replace(ONE, stage_one=None, stage_two=STAGE_TWO)


@pytest.fixture(scope="module")
def pod() -> Mesh:
    return make_mesh(ONE.hardware.mesh, describe("v5e:2x2").devices)


@pytest.fixture(scope="module")
def step_one(pod: Mesh) -> Program:
    return programs.training(ONE, pod)


# --- reports -------------------------------------------------------------------------------------------------------------


def product(pod: Mesh, gib: float = 0.0) -> Program:
    """x @ w, a row of x a device, w gathered; and so many GiB a chip that are doubled."""
    rows_of, width = P(("data", "fsdp")), 2048
    inputs = (
        jax.ShapeDtypeStruct((4 * 4096, width), jnp.bfloat16, sharding=NamedSharding(pod, rows_of)),
        jax.ShapeDtypeStruct((width, width), jnp.bfloat16, sharding=NamedSharding(pod, P("fsdp"))),
        jax.ShapeDtypeStruct((4, max(1, int(gib * 2**28))), jnp.float32, sharding=NamedSharding(pod, rows_of)),
    )

    def local(x: jax.Array, w: jax.Array, large: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ jax.lax.all_gather(w, "fsdp", tiled=True), large * 2

    function = jax.shard_map(local, mesh=pod, in_specs=(rows_of, P("fsdp"), rows_of), out_specs=(rows_of, rows_of), check_vma=False)
    return Program("a product", jax.jit(function).lower(*inputs), pod, needed=4 * 2 * 4096 * width**2)


def test_a_report_in_figures_that_are_known(pod: Mesh) -> None:
    plan = examine(product(pod), describe("v5e:2x2"), {})
    assert 0 < plan.compile_cpu_seconds < 60
    assert plan.fits and plan.chips == 4 and plan.mesh == {"data": 2, "fsdp": 2, "tensor": 1}
    assert plan.operations == plan.needed // 4 == 2 * 4096 * 2048**2
    assert plan.seconds is not None and plan.mfu is not None
    assert plan.seconds["compute"] == pytest.approx(2 * 4096 * 2048**2 / 197e12)
    (gather,) = plan.collectives
    assert (gather.kind, gather.dtypes, gather.over, gather.bytes) == ("all-gather", "bf16", ("fsdp",), 2048**2)
    assert plan.seconds["links"] == gather.seconds == pytest.approx(2048**2 / 50e9)  # one link of four: a row of two is no ring
    waited = plan.seconds["waits"]
    overlapped = max(plan.seconds["compute"], plan.seconds["memory"], gather.seconds - waited)
    assert plan.seconds["as_scheduled"] == pytest.approx(overlapped + waited)
    assert plan.mfu["at_best"] == pytest.approx(plan.seconds["compute"] / plan.seconds["at_best"])
    assert plan.memory["arguments"] >= (4096 * 2048 + 2048**2 // 2) * 2
    assert json.loads(json.dumps(plan.to_json()))["collectives"][0]["over"] == ["fsdp"]
    text = table(plan)
    for part in ("a product on v5e:2x2 (data=2 fsdp=2 tensor=1)", "of 16 GiB a chip", "bound by", "MFU", "all-gather bf16"):
        assert part in text


def test_a_report_of_what_does_not_fit(pod: Mesh) -> None:
    plan = examine(product(pod, gib=9), describe("v5e:2x2"), {}).with_remedies(("with less: 3 GiB",))
    assert not plan.fits and plan.seconds is None and plan.memory["used"] > plan.memory["available"]
    assert "does not fit: 18." in table(plan) and "would fit: with less: 3 GiB" in table(plan)
    assert json.loads(json.dumps(plan.to_json()))["fits"] is False


# --- rows ----------------------------------------------------------------------------------------------------------------


def test_rows_of_conversations_are_full() -> None:
    row = rows.conversation(BACKBONE, 512, None)
    assert row.tokens.shape == (1, 512) and (row.segments > 0).all() and (row.weights == 1).all()
    assert row.vision is not None and row.vision.patches.shape[1] == 1024
    assert np.count_nonzero(row.vision.frames) == 24 * 24  # one picture of 336 pixels: two are more than the row holds
    assert rows.conversation(BACKBONE, 512, 0).vision is None


def test_a_step_of_stage_one_needs_what_formulas_say(step_one: Program) -> None:
    forward = decoder_operations(BACKBONE.decoder, 1, 512, 512) + vision_operations(BACKBONE.vision, [(24, 24)])
    first = 2 * 576 * BACKBONE.vision.patch_values * BACKBONE.vision.width  # nothing learns from the slope of pixels
    assert step_one.needed == 8 * (3 * forward - first)


def test_moments_have_the_shapes_of_their_robot() -> None:
    panda = load_robots()["panda"]
    seen = rows.prompts(BACKBONE, POLICY, panda, 64)
    assert seen.batch.tokens.shape == (1, 160) and int(seen.mask.sum()) == 2 * 25 + 64  # two pictures of 5 x 5, an instruction
    made = rows.intents(seen, 128, np.float32)
    assert made.hidden.shape == (1, 128, 128) and int(made.mask.sum()) == 114
    alone = rows.intents(rows.prompts(BACKBONE, replace(POLICY, instruction="alone"), panda, 64), 128, np.float32)
    assert alone.hidden.shape == (1, 64, 128) and alone.mask.all()
    online, cached = (rows.moment(POLICY, panda, part) for part in (seen, made))
    assert isinstance(online.seen, Prompts) and isinstance(cached.seen, IntentRows)
    assert cached.chunks.actions.shape == (1, 16, 16) and cached.robots.state.shape == (1, 16)


# --- programs ------------------------------------------------------------------------------------------------------------


def products_of(program: Program) -> int:
    return program.lowered.as_text().count("dot_general")


@pytest.mark.parametrize(
    "run",
    [
        replace(ONE, stage_one=StageOneConfig(corpora={"a": "1"}, length=256, row_length=0, lora=LoraConfig(rank=4))),
        TWO,
        replace(TWO, stage_two=replace(STAGE_TWO, intents=("z",))),
    ],
    ids=["lora, text alone", "stage two", "cached intents"],
)
def test_the_step_of_a_run_is_lowered(pod: Mesh, run: Run) -> None:
    program = programs.training(run, pod)
    assert products_of(program) > 10 and program.needed > 0 and program.held > 0
    assert all(leaf.sharding.mesh == pod for leaf in jax.tree.leaves(program.parameters))


def test_what_acts_is_lowered(pod: Mesh) -> None:
    program = programs.sampling(TWO, pod)
    assert products_of(program) > 10 and program.needed > 0 and program.parameters is None
    with pytest.raises(RequestError, match="Stage II"):
        programs.sampling(ONE, pod)


def test_bytes_that_are_held(step_one: Program) -> None:
    """Half of each matrix a device, in float32, and two moments beside: 12 bytes a parameter, 6 of them here, and norms whole."""
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(step_one.parameters))
    assert 6 * count <= step_one.held < 6.3 * count


def test_a_run_without_a_model_says_so(pod: Mesh) -> None:
    with pytest.raises(RequestError, match="the run names no model"):
        programs.training(replace(ONE, model=None), pod)


TEXT = replace(BACKBONE.decoder, width=256, heads=2, kv_heads=2, ffn=1024, vocab=1024, mrope_section=(16, 24, 24))


def written(folder: Path, **changes: Any) -> str:
    """A run of text alone, as a file."""
    model = replace(BACKBONE, decoder=TEXT, vision=replace(BACKBONE.vision, out_width=256))
    optimizer = OptimizerConfig(rate=1e-5, modules=(ModuleConfig("vision.*", 0.0),))
    stage_one = StageOneConfig(corpora={"a": "1"}, length=256, row_length=0)
    file = folder / "run.yaml"
    file.write_text(render(replace(ONE, batch=4, model=model, stage_one=stage_one, optimizer=optimizer, **changes)))
    return str(file)


def test_the_command_says_what_a_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", written(tmp_path), "--topology", "v5e:2x2", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["fits"] and result["topology"] == "v5e:2x2" and "lowering the step" in said.err
    (plan,) = result["programs"]
    assert plan["program"] == "Stage I, a step" and plan["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and plan["faults"] == []
    # All of the forward pass that is not kept is made again, and attention computes the blocks that the diagonal only cuts.
    assert plan["needed"] < 4 * plan["operations"] <= 1.4 * plan["needed"]
    # Two gathers and one scatter of each layer's weights, one and one of the embedding and the head; slopes of all, between copies.
    kernels = TEXT.layers * (4 * 256**2 + 3 * 256 * 1024)
    tables = 2 * 256 * 1024
    received = {over: sum(one["bytes"] for one in plan["collectives"] if one["over"] == [over]) for over in plan["least"]}
    assert plan["least"] == {
        "fsdp": pytest.approx(3 * kernels + 2 * tables, rel=0.01),
        "data": pytest.approx(2 * (kernels + tables), rel=0.01),
    }
    assert all(received[over] == pytest.approx(least, rel=0.01) for over, least in plan["least"].items())


def test_the_command_says_no(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "training", lambda run, mesh: product(mesh, gib=9)._replace(parameters={}))
    monkeypatch.setattr(command, "remedies", lambda *_: ["with less: 3 GiB"])
    assert main(["plan", written(tmp_path), "--topology", "v5e:2x2"]) == 1
    said = capsys.readouterr()
    assert "does not fit" in said.out and "would fit: with less" in said.out
    assert re.search(r"blm: error: a product does not fit on v5e:2x2: it needs 18\.\d+ GiB of each chip's 15\.\d+$", said.err.strip())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5e"], "topology 'v5e' is not understood"),
        (["--topology", "v5e:2x2", "hardware.mesh.fsdp=8"], "does not fit 4 devices"),
        (["--topology", "v5e:2x2", "--rows", "4"], "a step's rows are batch="),
        (["--topology", "v5e:2x2", "--program", "sampling"], "only a run of Stage II"),
        (["--topology", "v5e:2x2", "batch=3"], "batch is 3"),
        (["--topology", "v5e:2x2", "--sweep", "batch=6"], "batch is 6"),
    ],
)
def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main(["plan", written(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_model_alone_is_planned_for_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[Program] = []

    def look(of: Program, topology: Any, options: Any) -> Plan:
        lowered.append(of)
        return Plan(of.name, "v5e:2x2", dict(of.mesh.shape), True, 0.0, 0.0, {"used": 1, "available": 2}, of.needed)

    monkeypatch.setattr(command, "examine", look)
    monkeypatch.setattr(command, "table", lambda plan: plan.program)
    file = tmp_path / "model.yaml"
    file.write_text(render(Experiment(BACKBONE, HardwareConfig(compute=ComputeConfig(dtype="bfloat16")))))
    assert main(["plan", str(file), "--topology", "v5e:2x2", "--rows", "8"]) == 0
    assert capsys.readouterr().out.splitlines() == ["generation, 8 prompts of 1024 tokens", "generation, a token for each of 8 prompts"]
    prompts, token = lowered
    assert prompts.mesh.shape["data"] == 4 and products_of(prompts) > products_of(token) > 10
    assert prompts.needed == decoder_operations(BACKBONE.decoder, 8, 1024, 8) + 8 * vision_operations(BACKBONE.vision, 3 * [(24, 24)])
    products = 2 * 8 * (BACKBONE.decoder.layers * layer_weights(BACKBONE.decoder) + BACKBONE.decoder.width * BACKBONE.decoder.vocab)
    context = 4 * 8 * BACKBONE.decoder.layers * (1024 + 512) * BACKBONE.decoder.heads * BACKBONE.decoder.head_dim
    assert token.needed == products + context
    assert main(["plan", str(file), "--topology", "v5e:2x2", "--program", "train"]) == 2
    assert "no stage_one or stage_two" in capsys.readouterr().err


def test_a_sweep_tries_each_mesh_and_keeps_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(ONE, hardware=replace(ONE.hardware, mesh=MeshConfig(4, 1, 1)))
    tried = [(one.mesh.data, one.mesh.fsdp, one.compute.remat) for one in command.candidates(run, describe("v5e:2x2"))]
    assert tried == [(data, fsdp, remat) for data, fsdp in ((4, 1), (2, 2), (1, 4)) for remat in ("none", "dots", "full")]
    monkeypatch.setattr(command, "training", lambda run, mesh: product(mesh, gib=9 if run.hardware.compute.remat == "none" else 0))
    result = command.plan_run(replace(run, hardware=replace(run.hardware, mesh=MeshConfig(1, 1, 1))), "v5e:1x1", sweep=True)
    assert [plan["fits"] for plan in result["programs"]] == [True, True, False] and result["fits"] and not result["no"]
    assert "remat=none" in result["text"].splitlines()[-1] and result["text"].endswith("does not fit")


def test_what_is_sent_at_least(pod: Mesh) -> None:
    """A frozen backbone is gathered for what is seen now and for what comes, and nothing of it is scattered or summed."""
    online, _ = programs.outline_two(TWO, STAGE_TWO, pod)
    cached, _ = programs.outline_two(TWO, replace(STAGE_TWO, intents=("z",)), pod)
    divided = [leaf for path, leaf in leaves(online.frozen["backbone"]) if "fsdp" in leaf.sharding.spec]
    more, less = least.received(online), least.received(cached)
    assert more["fsdp"] - less["fsdp"] == sum(2 * leaf.size // 2 * leaf.dtype.itemsize for leaf in divided)
    assert more["data"] == less["data"]


# --- remedies ------------------------------------------------------------------------------------------------------------


def test_changes_are_those_that_are_left(pod: Mesh) -> None:
    plain = replace(ONE, hardware=replace(ONE.hardware, compute=ComputeConfig(dtype="bfloat16")))
    assert command.changes(plain, pod, 1) == [
        ["hardware.compute.remat=full"],
        ["hardware.rows_at_once=1"],
        ["hardware.mesh.data=1", "hardware.mesh.fsdp=4"],
        ["optimizer.moments=int8"],
    ]
    spare = replace(ONE, batch=4, optimizer=OptimizerConfig(rate=1e-5, moments="int8"))
    assert command.changes(spare, pod, 2) == []


def test_the_first_change_that_fits_is_named(pod: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    program, topology = product(pod)._replace(held=20 * 2**30), describe("v5e:2x2")
    plan = Plan("p", "v5e:2x2", {"data": 2}, False, 0.0, 0.0, {"used": 2**35, "available": 2**34}, 1)
    fits: dict[str, Any] = {"run": lambda run: run.hardware.rows_at_once == 1}
    monkeypatch.setattr(command, "_used", lambda run, _: 2**33 if fits["run"](run) else None)
    assert list(command.remedies(ONE, topology, program, plan)) == ["with hardware.rows_at_once=1: 8.00 GiB"]
    fits["run"] = lambda run: run.hardware.rows_at_once == 1 and run.optimizer.moments == "int8"
    (told,) = command.remedies(ONE, topology, program, plan)
    assert told.startswith("with hardware.rows_at_once=1 hardware.mesh.data=1 hardware.mesh.fsdp=4 optimizer.moments=int8: 8.00")
    fits["run"] = lambda run: False
    (told,) = command.remedies(ONE, topology, program, plan)
    assert told.startswith("on more chips than 4: weights and optimizer state take 20.00 GiB") and "5.0 chips" in told
    assert meshes.batch_shards(pod) == 4
