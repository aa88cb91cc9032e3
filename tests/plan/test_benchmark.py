"""`blm bench plan`: its rows are well made, and those that are done are kept."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from blm_jax.errors import RequestError
from blm_jax.plan.command import mesh_for, read_plan
from blm_jax.plan.topology import describe
from blm_jax.recipe import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("plan")
    monkeypatch.setattr(importlib.import_module("_harness"), "RESULTS", tmp_path)
    return module


def test_rows_are_of_meshes_that_their_topologies_have(bench: Any) -> None:
    for row in bench.ROWS.values():
        of = read_plan([str(bench.ROOT / "configs" / file) for file in row.files], row.overrides)
        mesh = mesh_for(of, row.program, describe(row.topology))
        assert isinstance(of, Run)
        assert of.batch % math.prod(mesh.devices.shape[:2]) == 0 and of.hardware.compute.dtype == "bfloat16"


def sent(count: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "all-gather", "over": ("fsdp",), "bytes": count, "between_slices": False, **changes}


def program(**changes: Any) -> dict[str, Any]:
    """As a plan tells it, in round figures."""
    memory = {"used": 2**30, "temporaries": 100}
    of_chips = {"chips": 4, "mesh": {"data": 1, "fsdp": 4, "tensor": 1}, "needed": 300, "operations": 100}
    return {"fits": True, "faults": [], "collectives": [sent(120)], "least": {"fsdp": 100}, "memory": memory, **of_chips, **changes} | {
        "compile_seconds": 20.0,
        "compile_cpu_seconds": 30.0,
    }


def test_what_is_asked_of_a_row(bench: Any) -> None:
    found = bench.measures(bench.ROWS["stage_one"], None, program())
    assert found["memory_gib"] == 1.0 and found["faults"] == 0
    assert found["computed_over_needed"] == {"value": 1.333, "at_most": 1.4, "holds": True}
    assert found["sent_over_least_fsdp"] == {"value": 1.2, "at_most": 1.3, "holds": True}
    assert not bench.measures(bench.ROWS["stage_one"], None, program(operations=120))["computed_over_needed"]["holds"]
    assert found["compile_seconds"] == {"value": 20.0, "at_most": 300, "holds": True} and found["compile_cpu_seconds"] == 30.0
    small, large = ({"program": program(operations=operations)} for operations in (100, 103))
    grown = bench.grown(small, large)
    assert not grown["operations"]["holds"] and grown["temporaries"]["holds"] and grown["sent"]["value"] == 0
    # Of 4 chips a byte comes from 3 others, of 16 from 15: a quarter more is what more chips must send.
    assert bench.grown(small, {"program": program(chips=16, collectives=[sent(150)])})["sent"]["value"] == 0


def test_what_may_pass_between_slices(bench: Any) -> None:
    """Each of 8 copies adds up its 400 bytes within its slice of 4, which leaves 100 for each to send and to receive."""
    of_slices = {"topology": "2xv5p:2x2x4", "mesh": {"data": 8, "fsdp": 4, "tensor": 1}, "least": {"data": 700}}
    passed = [sent(80, kind="all-reduce", between_slices=True), sent(60, kind="all-gather", between_slices=True), sent(900)]
    found = bench.measures(bench.ROWS["two_slices"], None, program(collectives=passed, **of_slices))
    assert found["between_slices_gb"] == {"all-reduce": 0.0, "all-gather": 0.0}
    assert found["sent_over_least_between_slices"] == {"value": 1.4, "at_most": 1.3, "holds": False}
    assert "between_slices_gb" not in bench.measures(bench.ROWS["stage_one"], None, program())


def test_rows_are_written_one_by_one_and_kept(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []

    def measure(row: Any) -> dict[str, Any]:
        made.append(row.topology)
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"title": row.title, "program": program(), "text": "as told", "measures": {}}

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["sampling", "stage_one", "--save"])
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert list(kept["rows"]) == ["sampling"] and "stage_one" in kept["missing"] and "sampling" not in kept["missing"]
    result = bench.main(["sampling", "stage_one", "--save"])
    assert made == ["v5e:2x2", "v5e:16x16", "v5e:16x16"] and set(result["rows"]) == {"sampling", "stage_one"}
    monkeypatch.setattr(bench, "code", lambda: "changed")
    bench.main(["sampling", "--save"])
    assert made[3:] == ["v5e:2x2"]
    with pytest.raises(RequestError, match="no row other: there are stage_two_cached"):
        bench.main(["other"])
