"""`convert`: bit for bit both ways, whole or not at all, and never much in memory."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from blm_jax.convert import command, output
from blm_jax.convert.command import convert
from blm_jax.errors import RequestError, RunError
from blm_jax.weights import checkpoint, hashing, names
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.source import read_config
from tests.conftest import ROOT
from tests.models.oracle import CASES
from tests.weights.hub_dirs import ASSETS, assert_same_tensors, change_config, read_tensors, save_hub, snapshot

CONFIG = CASES["plain"]
FORMS: tuple[command.Form, ...] = ("hf", "checkpoint")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "hub"
    save_hub(directory, CONFIG, shard="200KB")
    return directory


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_hub_to_checkpoint_to_hub(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_hub(tmp_path / "hub", CASES[case], dtype, shard="150KB")
    there = convert(tmp_path / "hub", tmp_path / "checkpoint", "checkpoint")
    back = convert(tmp_path / "checkpoint", tmp_path / "back", "hf", max_shard_bytes=200_000)
    wanted = read_tensors(tmp_path / "hub")
    assert_same_tensors(read_tensors(tmp_path / "back"), wanted)
    assert ("lm_head.weight" in wanted) != CASES[case].decoder.tied
    for name in ("config.json", *ASSETS):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    total = sum(value.nbytes for value in wanted.values())
    assert index["metadata"]["total_size"] == total == there["bytes"] == back["bytes"]
    assert len(wanted) == there["tensors"] == back["tensors"] and there["fingerprint"] == back["fingerprint"]
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {file.name for file in files} and index["weight_map"].keys() == wanted.keys()
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(snapshot(tmp_path / "back")) == back["files"] and len(snapshot(tmp_path / "checkpoint")) == there["files"]


@pytest.mark.parametrize("case", ["plain", "tied"])
@pytest.mark.parametrize("shard", [10**5, 10**9], ids=["many files", "one file"])
def test_transformers_loads_the_export_as_it_is(case: str, shard: int, tmp_path: Path) -> None:
    model = save_hub(tmp_path / "hub", CASES[case])
    convert(tmp_path / "hub", tmp_path / "checkpoint", "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "back", "hf", max_shard_bytes=shard)
    loaded, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)  # pyright: ignore
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(40).reshape(2, 20) * 7
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_hub_to_hub_divides_anew(hub: Path, tmp_path: Path) -> None:
    convert(hub, tmp_path / "new", "hf", max_shard_bytes=50_000)
    assert_same_tensors(read_tensors(tmp_path / "new"), read_tensors(hub))
    sizes = [path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors")]
    largest = max(value.nbytes for value in read_tensors(hub).values())
    assert len(sizes) > 10 and max(sizes) < max(50_000, largest) + 8_000


def test_memory_is_a_few_pieces(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece in flight counts: read and not yet written. Whole gigabytes are measured by benchmarks/convert_memory.py."""
    monkeypatch.setattr(names, "PIECE_BYTES", 2000)
    seen: list[int] = []
    flying, most, read, write = [0], [0], hashing._read, checkpoint.write_piece

    def read_piece(*arguments: object) -> np.ndarray:
        flying[0] += 1
        most[0] = max(most[0], flying[0])
        block = read(*arguments)  # pyright: ignore
        seen.append(block.nbytes)
        return block

    def write_piece(*arguments: object) -> None:
        write(*arguments)  # pyright: ignore
        flying[0] -= 1

    monkeypatch.setattr(hashing, "_read", read_piece)
    monkeypatch.setattr(checkpoint, "write_piece", write_piece)
    convert(hub, tmp_path / "checkpoint", "checkpoint")
    assert most[0] <= 8  # four read ahead, one hashed, two written, one handed over
    convert(tmp_path / "checkpoint", tmp_path / "back", "hf")
    assert max(seen) <= 2000 and len(seen) > 900
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hub))


def test_what_is_written_says_where_it_is_from(hub: Path, tmp_path: Path) -> None:
    change_config(hub_copy := _copy(hub, tmp_path / "hub"), video_positions="transformers-4.57")
    convert(hub_copy, tmp_path / "checkpoint", "checkpoint")
    said = json.loads((tmp_path / "checkpoint" / "provenance.json").read_text())
    assert said["source"] == str(hub_copy) and said["video_positions"] == "transformers-4.57"
    assert said["fingerprint"] == fingerprint(hub) and said["versions"].keys() >= {"jax", "orbax-checkpoint"}
    # Training may choose anew: what it notes there holds, and goes into the export.
    (tmp_path / "checkpoint" / "provenance.json").write_text(json.dumps(said | {"video_positions": "transformers-5.23"}))
    convert(tmp_path / "checkpoint", tmp_path / "back", "hf")
    assert read_config(tmp_path / "checkpoint").video_positions == read_config(tmp_path / "back").video_positions == "transformers-5.23"


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for name, content in snapshot(source).items():
        (target / name).write_bytes(content)
    return target


@pytest.mark.parametrize("to", FORMS)
def test_an_output_that_exists_is_left_alone(to: command.Form, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(RequestError, match="out exists; choose another directory or remove it"):
        convert(hub, tmp_path / "out", to)
    assert snapshot(tmp_path) == {"out/mine": b"precious"}


def test_a_link_that_leads_nowhere_is_an_output_that_exists(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    monkeypatch.setattr(hashing, "_read", None)  # known before anything is read
    with pytest.raises(RequestError, match="out exists; choose another directory or remove it"):
        convert(hub, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("to", FORMS)
def test_all_is_on_the_disk_before_it_has_its_name(to: command.Form, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int | str] = []  # inodes synced, and the renaming
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), steps.append(os.fstat(file).st_ino)))
    monkeypatch.setattr(output.os, "rename", lambda old, new: (rename(old, new), steps.append("renamed")))
    convert(hub, tmp_path / "out", to)
    before, after = steps[: steps.index("renamed")], steps[steps.index("renamed") + 1 :]
    assert {path.stat().st_ino for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))} <= set(before)
    assert after == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal: bool, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(said, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", said)
    convert(hub, tmp_path / "out", "hf")
    assert ("convert:" in said.getvalue()) == terminal and (terminal or said.getvalue() == "")


@pytest.mark.parametrize("to", FORMS)
def test_a_failure_on_the_way_leaves_nothing(to: command.Form, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = hashing._read, []

    def fail_later(*arguments: object) -> np.ndarray:
        calls.append(arguments)
        if len(calls) > 30:
            raise OSError(28, "No space left on device")
        return read(*arguments)  # pyright: ignore

    monkeypatch.setattr(hashing, "_read", fail_later)
    with pytest.raises(RunError, match=r"writing .*out failed: No space left on device"):
        convert(hub, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from blm_jax.convert.command import convert
from blm_jax.weights import hashing
read, calls = hashing._read, []
def kill_later(*arguments):
    calls.append(arguments)
    if len(calls) > 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*arguments)
hashing._read = kill_later
convert(*sys.argv[1:])
"""


@pytest.mark.parametrize("to", FORMS)
def test_a_killed_run_leaves_nothing_that_looks_finished(to: command.Form, hub: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, hub, tmp_path / "out", to], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.partial" and snapshot(left)
    for directory in (left, tmp_path / "out"):
        with pytest.raises(RequestError):
            read_config(directory)
    convert(hub, tmp_path / "out", to)  # and the next run clears it away
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert fingerprint(tmp_path / "out") == fingerprint(hub)


def test_two_runs_at_once_do_not_disturb_each_other(hub: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("being written")
    other = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(RequestError, match="is being written by another process"):
        convert(hub, tmp_path / "out", "hf")
    assert snapshot(tmp_path) == {".out.partial/half": b"being written"}
    os.close(other)
    convert(hub, tmp_path / "out", "hf")


def test_requests_that_cannot_be_met(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="--to gguf: it must be hf, checkpoint or adapter"):
        convert(hub, tmp_path / "out", "gguf")  # pyright: ignore
    with pytest.raises(RequestError, match="give a larger size"):
        convert(hub, tmp_path / "out", "hf", max_shard_bytes=0)
    with pytest.raises(RequestError, match="is not a directory"):
        convert(tmp_path / "none", tmp_path / "out", "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file/out cannot be written: Not a directory"):
        convert(hub, tmp_path / "file" / "out", "hf")
    (tmp_path / "file").unlink()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(RequestError, match=r"out needs 0.0 GB, but .* has 0.0 GB free"):
        convert(hub, tmp_path / "new" / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_a_bucket_has_its_marker_last(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be renamed, the target itself is filled; what makes it a MODEL is written at the end."""
    for module in (output, command, checkpoint):
        monkeypatch.setattr(module, "is_local", lambda path: False)
    monkeypatch.setattr(checkpoint, "_kvstore", lambda directory: {"driver": "file", "path": f"{directory}/"})
    monkeypatch.setattr(hashing, "_read", lambda *arguments: (_ for _ in ()).throw(OSError(5, "connection lost")))
    for to in FORMS:
        with pytest.raises(RunError, match="connection lost"):
            convert(hub, tmp_path / to, to)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    for module in (output, command, checkpoint):
        monkeypatch.setattr(module, "is_local", lambda path: False)
    monkeypatch.setattr(checkpoint, "_kvstore", lambda directory: {"driver": "file", "path": f"{directory}/"})
    for to, marker in zip(FORMS, ("config.json", "commit_success.txt"), strict=True):
        convert(hub, tmp_path / to, to)
        written = {path.stat().st_mtime_ns: path.name for path in (tmp_path / to).rglob("*") if path.is_file()}
        assert written[max(written)] == marker
        assert fingerprint(tmp_path / to) == fingerprint(hub)
        (tmp_path / to / marker).unlink()
        with pytest.raises(RequestError):
            fingerprint(tmp_path / to)
