"""Plans of packed sequences: time and memory on one core, how full they are, how even, and how fast one is found.

    blm bench packing [--records N] [--save]

The records' lengths are drawn from tests/data/corpora/lengths.npy, whose contents lengths.py beside it describes. The plan is made in
a process of its own, bound to one core. Bounds: 60 s and 1 GB for 10 M records, 1 ms a sequence, 97 % of one budget and 90 % of the
other, and parts of a batch that differ by 10 % from their mean at most.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _harness
import numpy as np

from blm_jax.config import VisionConfig
from blm_jax.data.corpora.budget import Budget, row_budget
from blm_jax.data.corpora.packing import POOL, balanced, first_fit, longest_first, propose_row_length
from blm_jax.data.corpora.plan import Plan, Sequences, stored_plan
from blm_jax.data.mixture import Corpus, Mixture
from blm_jax.errors import RequestError, RunError

HERE = Path(__file__).parent
LENGTHS = HERE.parent / "tests" / "data" / "corpora" / "lengths.npy"
TOWER = VisionConfig(layers=32, width=1280, heads=16, ffn=3420, out_width=3584, full_attention_layers=(7, 15, 23, 31))
LENGTH = 4096  # tokens of a sequence
BATCHES = (64, 256, 1024)
LOOKED_UP = 20_000  # sequences, at random


def measure(records: int) -> dict[str, Any]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    known = np.load(LENGTHS)
    drawn = np.random.default_rng(0).integers(0, len(known), records, np.uint32)
    mixture = Mixture([Corpus("made-up", known[drawn, 0], known[drawn, 1])])
    row_length = propose_row_length(mixture, LENGTH, TOWER)
    budget = Budget(LENGTH, row_budget(row_length, TOWER))
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        plan = stored_plan(directory, mixture, budget, seed=0, epoch=0)
        made = time.perf_counter()
        stored_plan(directory, mixture, budget, seed=0, epoch=0)
        read = time.perf_counter()
        sequences = Sequences(mixture, budget, seed=0, batch=min(1024, len(plan)), directory=directory)
        lookups = look_up(sequences, len(plan))
        size = sum(file.stat().st_size for file in Path(directory).iterdir())
    return {
        "records": records,
        "sequences": len(plan),
        "budget": {"tokens": budget.tokens, "patches": budget.patches, "vision_row_length": row_length},
        "seconds": round(made - start, 2),
        "seconds_from_file": round(read - made, 2),
        "file_bytes": size,
        "fill": fill(plan, budget, known[drawn, 2], row_length),
        "microseconds_per_sequence": lookups,
        "max_over_mean": {str(batch): unevenness(plan, batch) for batch in BATCHES if batch <= len(plan)},
        "tokens_filled_by_pool": pools_beside(mixture, budget),
    }


def fill(plan: Plan, budget: Budget, patches: np.ndarray, row_length: int) -> dict[str, float]:
    """Parts of the budgets that are used, and the part of vision rows that is patches and not padding."""
    of_row = patches[plan.records].sum(dtype=np.int64) / row_length
    used = {"tokens": plan.tokens.sum(dtype=np.int64) / budget.tokens, "patches": plan.patches.sum(dtype=np.int64) / budget.patches}
    return {name: round(float(value) / len(plan), 4) for name, value in (used | {"vision_row": of_row}).items()}


def look_up(sequences: Sequences, count: int) -> dict[str, float]:
    """Processor time, in random order: so each is the first of its batch, and the batch's order is part of it."""
    numbers = np.random.default_rng(1).integers(0, count // sequences.batch * sequences.batch, LOOKED_UP).tolist()
    taken = []
    for number in numbers:
        start = time.thread_time()
        np.array(sequences.row(number // sequences.batch, number % sequences.batch))
        taken.append(1e6 * (time.thread_time() - start))
    return {"median": round(float(np.median(taken)), 1), "p99": round(float(np.percentile(taken, 99)), 1)}


def unevenness(plan: Plan, batch: int) -> dict[str, dict[str, float]]:
    """For each cut of the batch into equal parts, the largest part over the mean, in the worst batch of the epoch."""
    whole = len(plan) // batch * batch
    loads = {"tokens": plan.tokens[:whole].reshape(-1, batch), "patches": plan.patches[:whole].reshape(-1, batch)}
    orders = np.stack([balanced(tokens, patches) for tokens, patches in zip(*loads.values(), strict=True)])
    worst: dict[str, dict[str, float]] = {}
    for parts in (2**power for power in range(1, batch.bit_length())):
        sums = {name: np.take_along_axis(load, orders, 1).reshape(len(load), parts, -1).sum(2) for name, load in loads.items()}
        worst[str(parts)] = {name: round(float((part.max(1) / part.mean(1)).max()), 4) for name, part in sums.items()}
    return worst


def pools_beside(mixture: Mixture, budget: Budget) -> dict[str, float]:
    """Tokens filled in whole pools: first-fit in the order of arrival, and the longest first, which is what plans do."""
    count = min(16, max(1, len(mixture.tokens) // POOL)) * POOL
    if count > len(mixture.tokens):
        return {}
    tokens, patches = (lengths[:count].reshape(-1, POOL) for lengths in (mixture.tokens, mixture.patches))
    order = longest_first(tokens)
    orders = {"in order of arrival": np.broadcast_to(np.arange(POOL), order.shape), "longest first": order}
    found = {}
    for name, order in orders.items():
        bins = first_fit(np.take_along_axis(tokens, order, 1), np.take_along_axis(patches, order, 1), budget)
        found[name] = round(float(tokens.sum() / (bins.max(1) + 1).sum() / budget.tokens), 4)
    return found


def in_process(records: int) -> dict[str, Any]:
    """The measurement in a process of its own, and the peak of resident memory there."""
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import packing; print(json.dumps(packing.measure_with_peak({records})))"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | threads, cwd=HERE.parent)
    if done.returncode:
        raise RunError("making the plan failed")
    return json.loads(done.stdout)


def measure_with_peak(records: int) -> dict[str, Any]:
    found = measure(records)
    # Not what wait4 tells: that counts the process as it was before it became this one, a copy of its parent.
    [peak] = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return found | {"peak_bytes": int(peak) * 1024}


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="blm bench packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=lambda text: int(float(text)), default=10_000_000, help="default: 1e7")
    parser.add_argument("--save", action="store_true", help=f"write the result to {_harness.RESULTS.name}/")
    arguments = parser.parse_args(argv)
    if arguments.records < 1000:
        raise RequestError(f"--records {arguments.records}: at least 1000 make a plan worth measuring")
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"one core of {_harness.cpu_name()}",
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "numpy")} | {"python": platform.python_version()},
        **in_process(arguments.records),
    }
    show(result)
    if arguments.save:
        _harness.save("packing", result)
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['records']:,} records in {result['sequences']:,} sequences: {result['seconds']} s, {result['peak_bytes'] / 1e6:.0f} MB")
    print("filled: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in result["fill"].items()))
    print("one sequence: {median} us (median), {p99} us (99th percentile) of processor time".format(**result["microseconds_per_sequence"]))
    for batch, cuts in result["max_over_mean"].items():
        worst = {name: max(cut[name] for cut in cuts.values()) for name in ("tokens", "patches")}
        print(f"batch of {batch}: largest part over mean {worst['tokens']:.3f} in tokens, {worst['patches']:.3f} in patches, in any cut")


if __name__ == "__main__":
    _harness.run_as_script("packing", main)
