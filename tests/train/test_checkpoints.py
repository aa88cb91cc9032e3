"""Checkpoints of a run: bit for bit onto any mesh, whole or not at all, never half, never the damaged one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from blm_jax.errors import RequestError, RunError
from blm_jax.train import checkpoints as module
from blm_jax.train.checkpoints import Checkpoints, Restored, fingerprint_tree
from blm_jax.weights.steps import sum_of_part
from tests.conftest import ROOT
from tests.train.killed import KILLS, changed
from tests.train.trees import ASSETS, PROVENANCE, abstract, bits, values

ITEMS = ("params", "state")
MESHES = {"2x4": (2, 4, 1), "1x8": (1, 8, 1), "one device": ()}


def save(checkpoints: Checkpoints, step: int, seed: int | None = None, **metrics: float) -> float:
    return checkpoints.save(step, *values(step if seed is None else seed, abstract()), {"step": step}, ASSETS, PROVENANCE, metrics)


def write(directory: Path, *steps: int, **options: Any) -> Path:
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            save(checkpoints, step)
    return directory


def read(directory: Path, **options: Any) -> Restored:
    with Checkpoints(directory, **options) as checkpoints:
        restored = checkpoints.restore(*abstract())
    assert restored is not None
    return restored


def assert_is(restored: Restored | None, step: int, seed: int | None = None) -> None:
    assert restored is not None and restored.step == step and restored.data == {"step": step}
    assert bits((restored.params, restored.state)) == bits(values(step if seed is None else seed, abstract()))


# --- there and back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_on", MESHES)
def test_restored_onto_any_mesh(saved_on: str, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        there = values(7, abstract(*MESHES[saved_on]))
        checkpoints.save(7, *there, {"step": 7, "identity": {"é": [1.5, None]}}, ASSETS, PROVENANCE, {"loss": 0.5})
        for sizes in MESHES.values():
            asked = abstract(*sizes)
            restored = checkpoints.restore(*asked)
            assert restored is not None and restored.step == 7 and restored.data == {"step": 7, "identity": {"é": [1.5, None]}}
            assert restored.provenance == {**PROVENANCE, "metrics": {"loss": 0.5}}
            found = restored.params, restored.state
            assert bits(found) == bits(there) and jax.tree.structure(found) == jax.tree.structure(there)
            if sizes:
                assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, asked)
    for name, contents in ASSETS.items():
        assert (tmp_path / "7" / "assets" / name).read_bytes() == contents


def test_stock_orbax_reads_every_item(tmp_path: Path) -> None:
    write(tmp_path, 3)
    handler = ocp.CompositeCheckpointHandler()
    found = ocp.Checkpointer(handler).restore(
        tmp_path / "3", ocp.args.Composite(params=ocp.args.PyTreeRestore(), state=ocp.args.PyTreeRestore(), data=ocp.args.JsonRestore())
    )
    params, state = values(3, abstract())
    assert bits((found["params"], found["state"])) == bits((params, state)) and found["data"] == {"step": 3}


def test_a_save_returns_before_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what was saved may be changed, and steps() says nothing of it."""
    held, write_files = threading.Event(), module._write_files
    monkeypatch.setattr(module, "_write_files", lambda *arguments: held.wait(60) and write_files(*arguments))
    donate = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    big = {"x": jnp.arange(2.0**20)}
    with Checkpoints(tmp_path) as checkpoints:
        seconds = checkpoints.save(1, big, {"step": jnp.int32(1)}, {}, ASSETS, PROVENANCE)
        jax.block_until_ready(donate(big))
        assert checkpoints.steps() == [] and 0 < seconds < 30
        held.set()
        restored = checkpoints.restore({"x": jax.ShapeDtypeStruct((2**20,), jnp.float32)}, {"step": jax.ShapeDtypeStruct((), jnp.int32)})
        assert restored is not None and np.array_equal(restored.params["x"], np.arange(2.0**20)) and checkpoints.steps() == [1]


def test_which_are_kept(tmp_path: Path) -> None:
    """The last two, the two best, every tenth; a metric that is missing or no number is never the best."""
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: float("nan"), 6: 3.0, 10: 9.0, 11: 9.0, 12: 9.0, 13: 9.0}
    with Checkpoints(tmp_path, keep=2, best="loss", keep_best=2, keep_every=10) as checkpoints:
        for step, loss in losses.items():
            save(checkpoints, step, loss=loss) if step != 6 else save(checkpoints, step)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 10, 12, 13]
    with Checkpoints(tmp_path, keep=1, best="loss") as checkpoints:  # and after a restart
        assert checkpoints.steps() == [2, 4, 10, 12, 13] and checkpoints.latest() == 13
        save(checkpoints, 14)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 14] and sorted(os.listdir(tmp_path)) == ["14", "2"]


def test_a_good_one_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, seed=9)
        assert_is(checkpoints.restore(*abstract()), 1)


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.restore(*abstract()) is None and checkpoints.steps() == [] and checkpoints.latest() is None


# --- what is refused ---------------------------------------------------------------------------------------------------------


def test_another_tree_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    params, state = abstract()
    kernel, norm = params["decoder"]["blocks"]["kernel"], params["decoder"]["norm"]
    others = {
        "decoder.blocks.kernel is float32[3, 64, 20], this run has float32[2, 64, 20]": {
            "blocks": {"kernel": jax.ShapeDtypeStruct((2, 64, 20), jnp.float32)},
            "norm": norm,
        },
        "decoder.norm is float32[7], this run has bfloat16[7]": {
            "blocks": {"kernel": kernel},
            "norm": jax.ShapeDtypeStruct((7,), jnp.bfloat16),
        },
        "decoder.blocks.kernel is float32[3, 64, 20], this run has none": {"norm": norm},
        "decoder.head is missing, this run has float32[7]": {"blocks": {"kernel": kernel}, "norm": norm, "head": norm},
    }
    with Checkpoints(tmp_path) as checkpoints:
        for says, decoder in others.items():
            with pytest.raises(RequestError) as caught:
                checkpoints.restore({"decoder": decoder}, state)
            assert says in str(caught.value) and str(tmp_path / "1" / "params") in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(RequestError, match=r"optimizer\.m is .*; optimizer\.v is .*; step is "):
            checkpoints.restore(params, {})
        assert checkpoints.steps() == [1]


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="keep 0, keep_best 1, keep_every None: at least the last"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"file/checkpoints cannot be written: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at the next call, in one line; what was good stays, and a new run goes on from there."""

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_files", fail)
        save(checkpoints, 2)
        with pytest.raises(RunError, match=r"/2 could not be written \(.*No space left on device") as caught:
            save(checkpoints, 3)
    assert "\n" not in str(caught.value) and checkpoints.steps() == [1]
    checkpoints.close()
    assert_is(read(tmp_path), 1)


# --- damage ------------------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("two"), 1, 2)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def read_or_fall_back(directory: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """The newest good step; the other one was named where it is the older one."""
    restored = read(directory)
    assert_is(restored, restored.step)
    assert restored.provenance == {**PROVENANCE, "metrics": {}}
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == (restored.step == 1) and all(line.startswith(f"blm: {directory / '2'} is damaged: ") for line in said)
    return restored.step


def test_a_byte_flipped_anywhere(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Either it is found, or the byte was no part of what is restored. Values, trees and contracts are always found."""
    found = {}
    for path in files(two / "2"):
        sound, name = path.read_bytes(), str(path.relative_to(two / "2"))
        flip(path, len(sound) // 3)
        found[name] = read_or_fall_back(two, capsys)
        path.write_bytes(sound)
    for name in ("provenance.json", "data/metadata", "assets/config.json", "params/_METADATA", "state/_METADATA", "params/manifest.ocdbt"):
        assert found[name] == 1, name
    assert all(sum(step == 1 for name, step in found.items() if name.startswith(f"{item}/ocdbt.process_0/d/")) for item in ITEMS)
    assert all(step == 1 for name, step in found.items() if name.startswith(("params/d/", "state/d/")))
    assert found["contents.json"] == 1 and len(found) > 25


def test_every_value_is_covered(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where an array's bytes lie as they are."""
    kernel = np.asarray(values(2, abstract())[0]["decoder"]["blocks"]["kernel"]).tobytes()
    path = next(path for path in files(two / "2" / "params") if kernel in path.read_bytes())
    sound = path.read_bytes()
    first = sound.index(kernel)
    for place in range(first, first + len(kernel), 997):
        flip(path, place)
        assert read_or_fall_back(two, capsys) == 1
        path.write_bytes(sound)
    assert read_or_fall_back(two, capsys) == 2


def test_a_file_cut_or_gone(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (path for path in files(two / "2") if "state" not in path.parts):  # which is like params
        sound = path.read_bytes()
        for change in (lambda path=path: os.truncate(path, path.stat().st_size // 2), path.unlink):
            change()
            if path.name == "commit_success.txt" and path.parent.name == "2" and not path.exists():
                copy = shutil.copytree(two, tmp_path / "copy")  # for it is removed
                assert_is(read(copy), 1)
                assert f"{copy / '2'} is partial" in capsys.readouterr().err and os.listdir(copy) == ["1"]
            else:
                read_or_fall_back(two, capsys)
            path.write_bytes(sound)


def test_the_damaged_one_is_written_again_and_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1, 2, 3, keep=2)
    (tmp_path / "3" / "contents.json").unlink()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_is(checkpoints.restore(*abstract()), 2)
        assert checkpoints.steps() == [2] and (tmp_path / "3").is_dir()
        save(checkpoints, 3)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
        assert_is(checkpoints.restore(*abstract()), 3)
    said = capsys.readouterr().err
    assert f"{tmp_path / '3'} is damaged: contents.json is missing; passed over" in said
    assert f"{tmp_path / '3'}, which is damaged, is written again" in said


def test_all_are_damaged(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for step in "12":
        shutil.rmtree(tmp_path / step / "state")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(RequestError, match="no checkpoint that is not damaged; remove the directory"):
        checkpoints.restore(*abstract())
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_sums_in_parts_are_those_of_the_devices() -> None:
    params, state = values(5, abstract(1, 8, 1))
    for name, leaf in (("kernel", params["decoder"]["blocks"]["kernel"]), ("m", state["optimizer"]["m"])):
        whole = np.asarray(leaf)
        parts = [(slice(a, a + 1), slice(b, b + 30), slice(0, 20)) for a in range(3) for b in (0, 30)]
        parts += [(slice(0, 3), slice(60, 64), part) for part in (slice(0, 7), slice(7, 20))]
        total = sum(sum_of_part(whole[part], whole.shape, part) for part in parts) % 2**32
        assert total == int(module._sums({name: leaf})[name].value) == int(module._sums({name: jnp.asarray(whole)})[name].value)


def test_a_trees_fingerprint_is_of_its_bits_alone() -> None:
    whole = values(1, abstract())[1]
    found = {sizes: fingerprint_tree(values(1, abstract(*sizes))[1]) for sizes in MESHES.values()}
    assert len(set(found.values())) == 1 and fingerprint_tree({}) == fingerprint_tree({"none": {}})
    for other in ({**whole, "step": whole["step"] ^ 1}, {**whole, "step": whole["step"].astype(jnp.uint32)}, whole["optimizer"]):
        assert fingerprint_tree(other) != found[()]


# --- kills -------------------------------------------------------------------------------------------------------------------


def run_killed(what: str, directory: Path, rename: bool) -> None:
    command = [sys.executable, str(Path(__file__).parent / "killed.py"), what, str(directory), "rename" if rename else "marker"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rename", [False, True], ids=["marker", "rename"])
def test_a_writer_killed_at_every_change_of_a_file(rename: bool, tmp_path: Path) -> None:
    """What it left is the old checkpoint or the new one, whole; a new run may write at once."""
    run_killed("everywhere", tmp_path, rename)
    numbers = sorted(int(name) for name in os.listdir(tmp_path) if name != "0")
    found = []
    for number in numbers:
        with Checkpoints(tmp_path / str(number), rename=rename) as checkpoints:
            restored = checkpoints.restore(*abstract())
            assert restored is not None
            assert_is(restored, restored.step)
            found.append(restored.step)
            if number % 10 == 1:
                save(checkpoints, 2)
                assert_is(checkpoints.restore(*abstract()), 2)
    assert found == sorted(found) and {1, 2} == set(found) and numbers[-1] > 25 and found.count(2) > 2


def test_killed_ten_times_at_any_moment(tmp_path: Path) -> None:
    run_killed("anytime", tmp_path, rename=True)
    restored = read(tmp_path)
    trees = values(0, abstract())
    for step in range(1, restored.step + 1):
        trees = changed(trees, step)
    assert restored.step > KILLS and bits((restored.params, restored.state)) == bits(trees)


# --- two processes -----------------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path) -> None:
    """They save from 2 x 4 devices; then one process restores onto 1 x 8 and onto one device, and goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"), "PYTHONPATH": str(ROOT)}
    script, pipe = str(Path(__file__).parent / "checkpoint_process.py"), subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, script, port, str(index), tmp_path], env=environment, text=True, stdout=pipe, stderr=pipe)
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (json.loads((tmp_path / f"report-{index}.json").read_text()) for index in range(2))
    assert first == second and first["whole"] == [3, True, [2, 3]] and first["damaged"] == [2, True, [2]]
    assert "decoder.blocks.kernel is float32[3, 64, 20], this run has none" in first["another"]
    lines = [[line for line in err.splitlines() if line.startswith("blm:")] for _, err in said]
    assert [len(some) for some in lines] == [
        2,
        0,
    ] and "/3 is damaged: params/ cannot be read (a shard of the second process); passed over" in lines[0][0]
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == [2, 3]
        for sizes in ((1, 8, 1), ()):
            restored = checkpoints.restore(*abstract(*sizes))
            assert_is(restored, 3, seed=33)
