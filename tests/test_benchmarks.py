"""Benchmarks beside a peer: counts by hand, judgement on made-up times, and both plans of each from end to end on a tiny model."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from blm_jax import counts
from blm_jax.config import ComputeConfig
from blm_jax.errors import RequestError, RunError
from blm_jax.models.mllm import abstract_params
from blm_jax.models.policy import Policy, abstract_policy, policy_with_params
from tests.hlo import dot_flops
from tests.models.policies import make_inputs

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def backbone() -> Iterator[Any]:
    """Imported as `blm bench` does it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("backbone")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def acting(backbone: Any) -> Any:
    return importlib.import_module("act")


@pytest.fixture(scope="module")
def harness(backbone: Any) -> Any:
    return importlib.import_module("_harness")


@pytest.fixture(scope="module")
def sides(backbone: Any) -> Any:
    return importlib.import_module("_sides")


@pytest.fixture
def quick(harness: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(harness, "REST", 0)
    monkeypatch.setattr(harness, "TURN", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_decoder_operations_by_hand(backbone: Any) -> None:
    config = backbone.config_of("tiny").decoder
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert counts.layer_weights(config) == layer == 30720
    one_row = 2 * (2 * 3 * layer + 4 * (1 + 2 + 3) * 64) + 2 * 64 * 320
    assert counts.decoder_operations(config, 1, 3, 1) == one_row == 412_672
    assert counts.decoder_operations(config, 2, 3, 2) == 2 * one_row


def test_vision_operations_by_hand(backbone: Any) -> None:
    """10x8 patches are a full window of 8x8 and one of 2x8; one layer of two attends to all."""
    config = backbone.config_of("tiny").vision
    products = 2 * 80 * (1176 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 44))
    attention = 4 * 32 * (80 * 80 + 64 * 64 + 16 * 16)
    merger = 2 * 20 * (128 * 128 + 128 * 64)
    assert counts.vision_operations(config, [(10, 8)]) == products + attention + merger == 11_042_816
    assert counts.vision_operations(config, [(10, 8), (10, 8)]) == 2 * 11_042_816


def test_decode_bytes_by_hand(backbone: Any) -> None:
    config = backbone.config_of("tiny").decoder
    assert counts.decode_bytes(config, rows=2, context=10, itemsize=2) == 2 * (2 * 30720 + 64 * 320 + 2 * 2 * 10 * 2 * 32)


@pytest.mark.parametrize(("size", "published"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_parameters(backbone: Any, size: str, published: int) -> None:
    config = backbone.config_of(size)
    assert counts.parameters(config) == published
    assert counts.parameters(config) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def test_default_size_is_about_100_m(backbone: Any) -> None:
    assert counts.parameters(backbone.config_of("100m")) == pytest.approx(110e6, rel=0.1)


def test_chips() -> None:
    assert counts.chip_of("NVIDIA H200") == (989, 4800)
    assert counts.chip_of("TPU v5 lite") == counts.CHIPS["TPU v5e"] == (197, 819)
    assert counts.chip_of("TPU v5") == counts.chip_of("TPU v5p") == (459, 2765)
    assert counts.chip_of("cpu") is None


def test_training_and_decoding_count_every_token(backbone: Any, sides: Any) -> None:
    config = backbone.config_of("tiny")
    work, unit = backbone.work_of(sides.Phase("train", 2, 6), config, 4)
    assert (work, unit) == (3 * counts.decoder_operations(config.decoder, 2, 6, 12), "TFLOP/s")
    work, unit = backbone.work_of(sides.Phase("decode", 3, 10, new=3), config, 2)
    assert (work, unit) == (sum(counts.decode_bytes(config.decoder, 3, context, 2) for context in (11, 12)), "TB/s")


def test_summary_takes_the_fastest_peer(backbone: Any, sides: Any) -> None:
    config, phase = backbone.config_of("tiny"), sides.Phase("prefill", 2, 5)
    seconds = {"blm_jax": [2.0, 1.0, 3.0], "fast": [4.0, 3.0, 3.0], "slow": [9.0, 2.0, 9.0]}
    row = backbone.summary(phase, config, 4, seconds, counts.Chip(1e-6, 1.0))
    assert row["ratio"] == {"peer": "fast", "median": 1.5, "min": 3.0, "rounds": [1.0, 3.0]}
    ours = row["sides"]["blm_jax"]
    assert (ours["median_s"], ours["min_s"], ours["tokens_per_s"]) == (2.0, 1.0, 5.0)
    assert ours["of_peak"] == pytest.approx(counts.decoder_operations(config.decoder, 2, 5, 2) / 2 / 1e6)


def test_sides_take_turns(harness: Any) -> None:
    order = []

    def run(name: str) -> Any:
        return lambda: (float(len(order)), order.append(name))

    seconds = harness.take_turns({"a": run("a"), "b": run("b")}, 3, 0)
    assert order == ["a", "a", "b", "b"] * 3  # the first run of a turn is not timed
    assert seconds == {"a": [1.0, 5.0, 9.0], "b": [3.0, 7.0, 11.0]}


def test_side_by_side(
    backbone: Any, harness: Any, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The float32 plan whole: outputs agree, all phases are timed, cores and threads are pinned, the result is kept."""
    torch.set_num_threads(2)
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: pinned.append(len(cores)))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    result = backbone.main(["--size", "tiny", "--repeats", "1", "--threads", "1", "--save"])
    assert pinned == [1] and torch.get_num_threads() == 1
    assert [row["sizes"]["kind"] for row in result["phases"]] == ["prefill", "prefill", "decode", "decode", "train", "train"]
    assert all(row["compared"] and row["ratio"]["median"] > 0 for row in result["phases"])
    assert all("others_cores" in row for row in result["phases"])
    assert len(result["phases"][-1]["sides"]) == 3  # ours and both of PyTorch's optimizers
    assert [path.name for path in tmp_path.iterdir()] == ["backbone_cpu.json"]
    assert json.loads((tmp_path / "backbone_cpu.json").read_text()) == json.loads(json.dumps(result))
    assert "training step 2x48, 2 pictures" in capsys.readouterr().out


def test_nothing_is_timed_when_outputs_differ(backbone: Any, sides: Any, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sides.Transformers.params

    def wrong(peer: Any) -> dict[str, Any]:
        params = honest(peer)
        params["decoder"]["norm"]["scale"] *= 1.1
        return params

    monkeypatch.setattr(sides.Transformers, "params", wrong)
    for phase in (sides.Phase("prefill", 1, 16), sides.Phase("train", 1, 16)):
        with pytest.raises(RunError, match=rf"{phase.title}: the two sides do not agree"):
            backbone.side_by_side(backbone.config_of("tiny"), [phase], 1)


def test_on_an_accelerators_plan(backbone: Any, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = backbone.main(["--size", "tiny", "--dtype", "bfloat16", "--repeats", "1", "--peak-tflops", "1", "--bandwidth", "100"])
    assert [row["sizes"]["kind"] for row in result["phases"]] == ["prefill", "prefill", "vision", "decode", "decode"]
    for row in result["phases"]:
        assert list(row["sides"]) == ["blm_jax", "transformers"]
        assert all(0 < side["of_peak"] < 1 for side in row["sides"].values())
    assert "%" in capsys.readouterr().out


def test_without_a_peer(
    backbone: Any, harness: Any, sides: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "peer_device", lambda _: ("torch sees no GPU", "cuda"))
    monkeypatch.setattr(backbone, "phases_of", lambda *_: [sides.Phase("prefill", 1, 16)])
    result = backbone.main(["--size", "tiny", "--dtype", "bfloat16", "--repeats", "1"])
    assert list(result["phases"][0]["sides"]) == ["blm_jax"]
    assert "note: the peer was not measured: torch sees no GPU" in capsys.readouterr().out


def test_work_of_others_is_seen(harness: Any) -> None:
    before = harness.foreign_work()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert harness.foreign_work() - before > 0.4


def test_peer_needs_the_same_device(harness: Any) -> None:
    assert harness.peer_device("cpu") == (None, "cpu")
    assert harness.peer_device("tpu")[0] == "torch does not run on tpu"
    if not torch.cuda.is_available():
        assert "sees no GPU" in harness.peer_device("gpu")[0]


def test_acting_side_by_side(
    acting: Any, harness: Any, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    cases = acting.cases_of("tiny")
    monkeypatch.setattr(acting, "cases_of", lambda _: [cases[1], cases[2], *cases[-2:]])
    result = acting.main(["--size", "tiny", "--repeats", "1", "--threads", "1", "--eager", "--save"])
    assert [row["case"]["going_on"] for row in result["phases"]] == ["", "", "guided", "given"]
    assert all(row["compared"] and list(row["sides"]) == ["blm_jax", "PyTorch, eager"] for row in result["phases"])
    assert json.loads((tmp_path / "act_cpu.json").read_text()) == json.loads(json.dumps(result))
    printed = capsys.readouterr().out
    assert "2 observations: 0.02 GFLOP" in printed and "note: going on with the last chunk adds" in printed


def test_acting_on_an_accelerators_plan(
    acting: Any, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = acting.cases_of("tiny")
    monkeypatch.setattr(acting, "cases_of", lambda _: cases[2:3])
    argv = ["--size", "tiny", "--dtype", "bfloat16", "--repeats", "1", "--eager", "--peak-tflops", "1", "--bandwidth", "100"]
    result = acting.main(argv)
    assert list(result["phases"][0]["sides"]) == ["blm_jax", "PyTorch, eager"]
    assert all(side["times_bound"] > 1 for row in result["phases"] for side in row["sides"].values())
    assert "at least" in capsys.readouterr().out


def test_no_acting_is_timed_when_actions_differ(acting: Any, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = importlib.import_module("_acting")
    honest = sides.exported

    def wrong(config: Any, params: Any, *rest: Any) -> Any:
        return honest(config, {**params, "action_places": params["action_places"] * 1.1}, *rest)

    monkeypatch.setattr(sides, "exported", wrong)
    with pytest.raises(RunError, match="1 observation: the two sides do not agree"):
        acting.side_by_side(acting.sizes_of("tiny"), acting.cases_of("tiny"), 1, (False,))


@pytest.mark.parametrize("patch", [1, 2])
def test_acting_is_counted_as_the_compiler_does(acting: Any, patch: int) -> None:
    """Of one robot's policy whose every loop goes round once; counted are products alone, on both sides."""
    config = acting.sizes_of("tiny").policy
    config = replace(config, robots=("panda",), embodiment=replace(config.embodiment, patch=patch))
    rows, samples, tokens = 2, 3, 11
    policy = policy_with_params(config, ComputeConfig(), abstract_policy(config))
    inputs = make_inputs(config, rows, tokens)

    def condition(policy: Policy) -> Any:
        return policy.condition(inputs.intent, inputs.robots)

    def velocity(policy: Policy, made: Any, noised: Any) -> Any:
        return policy.velocity(made, noised, jnp.zeros(1)).actions

    noised = jnp.zeros((rows * samples, config.horizon, config.embodiment.action_width))
    found = dot_flops(jax.jit(condition).lower(policy).compile())
    assert found == counts.bridge_operations(config, rows, rows * tokens)
    found = dot_flops(jax.jit(velocity).lower(policy, jax.eval_shape(condition, policy), noised).compile())
    assert found == counts.step_operations(config, rows * samples)


def test_weights_of_acting_are_all_of_the_policys(acting: Any) -> None:
    """Kernels, without the future's head and the keys and values that a step finds ready, which are the bridge's to make."""
    config = replace(acting.sizes_of("tiny").policy, robots=("panda",))
    params = abstract_policy(config)
    kernels = sum(math.prod(leaf.shape) for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel")
    head = sum(math.prod(params["future_head"][name]["kernel"].shape) for name in ("inner", "outer"))
    assert counts.bridge_weights(config) + counts.step_weights(config) == kernels - head


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "7b"], "--size 7b takes too long in float32"),
        (["--size", "3b", "--dtype", "bfloat16"], "jax sees none here"),
        (["--repeats", "0"], "at least 1"),
        (["--threads", "100000"], "cores to run on"),
        (["--bandwidth", "100"], "go together"),
    ],
)
def test_wrong_requests(backbone: Any, argv: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        backbone.main(argv)
