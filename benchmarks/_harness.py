"""What benchmarks beside a peer share: turns, ratios, a quiet machine or none, and a result that tells its terms."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blm_jax.counts import Chip, chip_of
from blm_jax.errors import RequestError, RunError

# One run: the seconds it took, and what came out, for comparison.
Run = Callable[[], tuple[float, np.ndarray]]
Result = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
REST = 0.25  # seconds; idle OpenMP threads may spin for 0.2
REPEATS = 5
TURN = 0.2  # seconds: runs that are shorter are timed several times a turn


# --- measuring -----------------------------------------------------------------------------------------------------------


def take_turns(runs: Mapping[str, Run], repeats: int, rest: float) -> dict[str, list[float]]:
    """Seconds of each: A B A B ..., so that whatever else the machine does falls on all alike.

    A turn begins with a run that is not timed. Memory that a side gave back before it waited is fetched there, gigabytes for a
    training step, which no one pays who takes step after step. Of several runs in a turn the median counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(rest)
            run()
            turn = [run()[0]]
            while sum(turn) < TURN:
                turn.append(run()[0])
            seconds[name].append(statistics.median(turn))
    return seconds


def watched_turns(runs: Mapping[str, Run], repeats: int) -> tuple[dict[str, list[float]], float]:
    """Turns with a rest before each, and how many cores other processes kept busy meanwhile."""
    start, before = time.perf_counter(), foreign_work()
    seconds = take_turns(runs, repeats, REST)
    return seconds, round((foreign_work() - before) / (time.perf_counter() - start), 2)


def foreign_work() -> float:
    """Core seconds that other processes have used on this machine."""
    user, nice, system, _idle, _waiting, *rest = (int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def one_after_the_other(sides: Mapping[str, Callable[[], Callable[[Any], Mapping[str, Run]]]], phases: Sequence[Any], repeats: int) -> list:
    """Seconds of each run of each phase, a side at a time, as the weights of both may not fit; memory of the first is free again.

    `sides` makes each side, which gives a phase's runs.
    """
    found: list[dict[str, list[float]]] = [{} for _ in phases]
    for name, make in sides.items():
        runs_of = make()
        for phase, seconds in zip(phases, found, strict=True):
            progress(f"{phase.title}: {name}")
            runs = runs_of(phase)
            for run in runs.values():
                run()  # compiles
            seconds.update(take_turns(runs, repeats, 0))
        del runs_of, runs
        gc.collect()
    return found


def peer_device(backend: str) -> tuple[str | None, str]:
    """Why PyTorch can't run where we do, or None; and its name of that device."""
    import torch

    if backend == "gpu":
        return (None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"), "cuda"
    return (None if backend == "cpu" else f"torch does not run on {backend}"), "cpu"


def check(holds: bool, title: str, found: str) -> None:
    if not holds:
        raise RunError(f"{title}: the two sides do not agree, so nothing was timed: {found}")


# --- telling -------------------------------------------------------------------------------------------------------------


def times_of(times: Sequence[float]) -> Result:
    return {"median_s": statistics.median(times), "min_s": min(times), "all_s": [round(time, 5) for time in times]}


def ratio_of(seconds: Mapping[str, Sequence[float]], ours: str) -> Result | None:
    """How many times as fast ours is as the fastest of the others."""
    peers = [name for name in seconds if name != ours]
    if not peers:
        return None
    peer = min(peers, key=lambda name: statistics.median(seconds[name]))
    rounds = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
    return {
        "peer": peer,
        "median": statistics.median(seconds[peer]) / statistics.median(seconds[ours]),
        "min": min(seconds[peer]) / min(seconds[ours]),
        "rounds": [min(rounds), max(rounds)],
    }


def versus(ratio: Result | None, name: str) -> str:
    """As a table's last column has it, at the row of the peer it is about."""
    return f"  {ratio['median']:.2f} ({ratio['rounds'][0]:.2f} to {ratio['rounds'][1]:.2f})" if ratio and name == ratio["peer"] else ""


def terms(args: argparse.Namespace, packages: Sequence[str]) -> Result:
    """All that numbers mean nothing without."""
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax", "flax", *packages)},
        "size": args.size,
        "dtype": args.dtype,
        "threads": args.threads if args.dtype == "float32" else None,
        "repeats": args.repeats,
    }


def hardware() -> Result:
    import jax

    device = jax.devices()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = cpu_name() if device.platform == "cpu" else device.device_kind
    return {"device": name, "cpu": cpu_name(), "cores": os.cpu_count(), "memory_gib": round(memory)}


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']}, family {facts.get('cpu family')}, model {facts.get('model')}"


def notes_of(dtype: str, rows: Sequence[Result], no_peer: str | None) -> list[str]:
    notes = []
    busy = max(row.get("others_cores", 0) for row in rows)
    if busy > 0.1:
        notes.append(f"other processes kept up to {busy:.1f} cores busy meanwhile: measure again on a quiet machine")
    if dtype == "float32" and "AMD" in cpu_name():
        notes.append("PyTorch multiplies by MKL, which takes a slower path on processors of AMD: on those of Intel expect lower ratios")
    if no_peer is not None:
        notes.append(f"the peer was not measured: {no_peer}")
    return notes


def progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def save(name: str, result: Result) -> None:
    """Whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(RESULTS / f"{name}.json")


def file_name(benchmark: str, result: Result) -> str:
    device = result["hardware"]["device"].lower().replace(" ", "_")
    return f"{benchmark}_cpu" if result["dtype"] == "float32" else f"{benchmark}_{result['size']}_{device}"


# --- the command line ----------------------------------------------------------------------------------------------------


def parser_of(name: str, description: str | None, sizes: Sequence[str], default: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"blm bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sizes, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="cores for float32 (default: 2)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds (default: {REPEATS})")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="of a chip that is not in the table")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of its memory")
    parser.add_argument("--save", action="store_true", help=f"write the result to {RESULTS.name}/")
    return parser


def check_arguments(args: argparse.Namespace, large: Sequence[str]) -> None:
    if args.repeats < 1 or args.threads < 1:
        raise RequestError("--repeats and --threads are at least 1")
    if args.size in large and args.dtype == "float32":
        raise RequestError(f"--size {args.size} takes too long in float32, which is for a CPU: add --dtype bfloat16 on an accelerator")
    if (args.peak_tflops is None) != (args.bandwidth is None):
        raise RequestError("--peak-tflops and --bandwidth go together")


def prepare(args: argparse.Namespace) -> None:
    """Before jax is started."""
    if args.dtype == "float32":
        pin(args.threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its share of an accelerator


def pin(threads: int) -> None:
    """Both sides onto the same cores. XLA makes a thread for each core it may use, so this comes before jax is started."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise RequestError(f"--threads {threads}: there are {len(cores)} cores to run on")
    os.sched_setaffinity(0, cores[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import torch

    torch.set_num_threads(threads)


def peak_of(args: argparse.Namespace, large: Sequence[str], small: str) -> Chip | None:
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu" and args.size in large:
        raise RequestError(f"--size {args.size} is for an accelerator, and jax sees none here: install jax for it, or take --size {small}")
    if args.peak_tflops is not None:
        return Chip(args.peak_tflops, args.bandwidth)
    return chip_of(device.device_kind)


def run_as_script(name: str, main: Callable[[list[str]], Result]) -> None:
    """As `python benchmarks/NAME.py`, with the exit codes of `blm`."""
    try:
        main(sys.argv[1:])
    except (RequestError, RunError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, RequestError) else 1) from None
