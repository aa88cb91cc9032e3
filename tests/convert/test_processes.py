"""Two processes of four devices: each reads its own slices, both write the same files as one, one of them speaks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.convert.command import convert
from tests.conftest import ROOT
from tests.models.oracle import TOKENS, params_of
from tests.weights.hub_dirs import save_hub, snapshot

# Everything is divisible by eight, on either axis.
CONFIG = BackboneConfig(
    VisionConfig(layers=2, width=64, heads=8, ffn=48, out_width=128, full_attention_layers=(1,), window=56),
    DecoderConfig(layers=2, width=128, heads=8, kv_heads=8, ffn=96, vocab=320, tied=False, mrope_section=(2, 3, 3)),
    TOKENS,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    params = params_of(save_hub(folder / "hub", CONFIG), CONFIG)
    by_name = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    np.savez(folder / "wanted.npz", **by_name)
    (folder / "out").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).parent / "process.py"), port, "2"]
    processes = [
        subprocess.Popen(
            [*command, str(index), folder / "hub", folder / "out"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    reports = [json.loads((folder / "out" / f"report-{index}.json").read_text()) for index in range(2)]
    return {"folder": folder, "params": by_name, "reports": reports, "said": said}


@pytest.mark.parametrize("mesh", ["tensor", "fsdp", "replicated"])
def test_each_process_reads_its_own_slices_once(mesh: str, run: dict[str, Any]) -> None:
    whole = sum(leaf.nbytes for leaf in run["params"].values())
    for report in run["reports"]:
        load = report["loads"][mesh]
        assert load["equal"] and load["read"] == load["mine"]
        # Half of what is divided: norms never are, the patch embedding only by fsdp.
        assert load["mine"] == whole if mesh == "replicated" else whole / 2 <= load["mine"] < {"tensor": 0.65, "fsdp": 0.52}[mesh] * whole


@pytest.mark.parametrize("to", ["checkpoint", "hf", "back"])
def test_two_processes_write_the_files_of_one(to: str, run: dict[str, Any], tmp_path: Path) -> None:
    folder = run["folder"]
    source = folder / "out" / "checkpoint" if to == "back" else folder / "hub"
    alone = convert(source, tmp_path / to, "checkpoint" if to == "checkpoint" else "hf", max_shard_bytes=100_000)
    found, wanted = snapshot(folder / "out" / to), snapshot(tmp_path / to)
    assert found.keys() == wanted.keys() and len(found) > 10
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert {report[to]["fingerprint"] for report in run["reports"]} == {alone["fingerprint"]}
    assert run["reports"][0][to]["files"] == alone["files"]
    shares = [report[to]["read"] for report in run["reports"]]
    assert sum(shares) == alone["bytes"] and min(shares) > 0.3 * alone["bytes"]  # each its part, none twice


def blm_in_two_processes(*arguments: str | Path) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    program = "import sys; from blm_jax.cli import entry; sys.argv[0] = 'blm'; entry()"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        several = ["--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--processes", "2", "--process"]
    command, pipe = [sys.executable, "-c", program, *arguments, *several], subprocess.PIPE
    processes = [subprocess.Popen([*command, str(index)], cwd=ROOT, text=True, stdout=pipe, stderr=pipe) for index in range(2)]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, said, strict=True)]


def test_on_the_command_line(run: dict[str, Any], tmp_path: Path) -> None:
    hub = run["folder"] / "hub"
    (code, out, err), other = blm_in_two_processes("convert", hub, tmp_path / "two", "--to", "hf", "--max-shard-size", "100KB", "--json")
    assert (code, other[:2]) == (0, (0, "")), (err, other)
    alone = convert(hub, tmp_path / "one", "hf", max_shard_bytes=100_000)
    told = json.loads(out)
    assert {key: told[key] for key in ("files", "tensors", "bytes", "fingerprint")} == {
        key: alone[key] for key in ("files", "tensors", "bytes", "fingerprint")
    }
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")
    again = blm_in_two_processes("convert", hub, tmp_path / "two", "--to", "hf")
    assert [(code, out) for code, out, _ in again] == [(2, ""), (2, "")]
    for (_, _, err), where in zip(again, ("", " (process 1)"), strict=True):
        lines = [line for line in err.splitlines() if line.startswith("blm: error")]
        assert lines == [f"blm: error{where}: {tmp_path / 'two'} exists; choose another directory or remove it"]
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")


def test_where_one_process_fails_all_do_and_nothing_is_left(run: dict[str, Any]) -> None:
    first, last = (report["failure"] for report in run["reports"])
    assert "the disk of the last process" in last and "process 1 of 2 failed" in first
    assert sorted(path.name for path in (run["folder"] / "out").iterdir()) == ["back", "checkpoint", "hf", "report-0.json", "report-1.json"]


def test_only_the_first_process_shows_progress(run: dict[str, Any]) -> None:
    (out0, err0), (out1, err1) = run["said"]
    assert [line for line in (out0 + out1).splitlines() if not line.startswith("[Gloo]")] == []  # jaxlib's own lines
    assert "convert:" in err0 and "weights:" in err0
    assert "convert:" not in err1 and "weights:" not in err1
