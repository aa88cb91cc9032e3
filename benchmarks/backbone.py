"""The backbone beside transformers in PyTorch, in one run.

    blm bench backbone [--save]                             on a CPU: one set of weights, outputs compared first, float32
    blm bench backbone --size 7b --dtype bfloat16           on an accelerator: random weights made there

In float32 both sides hold the same weights on the same CPU cores and take turns. A pause before each turn lets the threads of the
other side go to sleep. Nothing is timed before the outputs agree. In bfloat16 one side runs after the other, ours first, and
speeds are also given as parts of what the chip can do.
"""

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _counts import Chip, chip_of, decode_bytes, decoder_operations, parameters, vision_operations

from blm_jax import configfile
from blm_jax.config import BackboneConfig, DecoderConfig, TokenConfig, VisionConfig
from blm_jax.errors import RequestError, RunError

if TYPE_CHECKING:  # jax is imported once the threads are pinned
    from _sides import Ours, Phase, Run, Transformers

HERE = Path(__file__).parent
RESULTS = HERE / "results"
REST = 0.25  # seconds; idle OpenMP threads may spin for 0.2
REPEATS = 5
TOKENS = TokenConfig(image=1, video=2, vision_start=3, vision_end=4, pad=0)
SMALL = {
    "100m": BackboneConfig(
        VisionConfig(layers=8, width=384, heads=6, ffn=1024, out_width=768, full_attention_layers=(3, 7)),
        DecoderConfig(layers=12, width=768, heads=12, kv_heads=2, ffn=2560, vocab=16384, tied=True, mrope_section=(8, 12, 12)),
        TOKENS,
    ),
    "tiny": BackboneConfig(
        VisionConfig(layers=2, width=32, heads=2, ffn=44, out_width=64, full_attention_layers=(1,)),
        DecoderConfig(layers=2, width=64, heads=4, kv_heads=2, ffn=96, vocab=320, tied=False, mrope_section=(2, 3, 3)),
        TOKENS,
    ),
}
LARGE = ("3b", "7b")
Result = dict[str, Any]


def config_of(size: str) -> BackboneConfig:
    if size in SMALL:
        return SMALL[size]
    return configfile.load(HERE.parent / "configs" / "model" / f"qwen2_5_vl_{size}.yaml").model


def phases_of(size: str, dtype: str) -> list[Phase]:
    from _sides import Phase

    photographs = ((24, 32), (36, 26), (24, 34))  # 14 pixels a patch: 336x448, 504x364, 336x476
    plans = {
        "float32": [
            Phase("prefill", 2, 512),
            Phase("prefill", 2, 512, photographs),
            Phase("decode", 1, 512, new=64),
            Phase("decode", 4, 512, new=64),
            Phase("train", 2, 512),
            Phase("train", 2, 512, photographs),
        ],
        "bfloat16": [
            Phase("prefill", 1, 4096),
            Phase("prefill", 4, 2048),
            Phase("vision", 4, 0, ((72, 72),) * 4),  # a million pixels each
            Phase("decode", 1, 2048, new=129),
            Phase("decode", 16, 2048, new=129),
        ],
    }
    if size != "tiny":
        return plans[dtype]
    small: dict[str, Any] = {"length": 48, "pictures": ((4, 6), (10, 8)), "new": 5}

    def shrink(phase: Phase) -> Phase:
        return replace(phase, rows=min(phase.rows, 2), **{name: value for name, value in small.items() if getattr(phase, name)})

    return [shrink(phase) for phase in plans[dtype]]


# --- measuring -----------------------------------------------------------------------------------------------------------


def take_turns(runs: dict[str, Run], repeats: int, rest: float) -> dict[str, list[float]]:
    """Seconds of each: A B A B ..., so that whatever else the machine does falls on all alike.

    A turn begins with a run that is not timed. Memory that a side gave back before it waited is fetched there, gigabytes for a
    training step, which no one pays who takes step after step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(rest)
            run()
            seconds[name].append(run()[0])
    return seconds


def foreign_work() -> float:
    """Core seconds that other processes have used on this machine."""
    user, nice, system, _idle, _waiting, *rest = (int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def side_by_side(config: BackboneConfig, phases: list[Phase], repeats: int) -> list[Result]:
    """float32 on the CPU: the same weights, compared, then timed in turns."""
    from _sides import Ours, Transformers, examples_of

    peer = Transformers(config, "float32", "cpu")
    results = []
    for phase in phases:
        progress(f"{phase.title}: compiling and comparing")
        ours = Ours(config, "float32", peer.params())  # anew, as training changes the peer's
        examples = examples_of(phase, config)
        runs = ours.runs(phase, examples) | peer.runs(phase, examples)
        compared = agree(phase, runs, peer, examples)
        progress(f"{phase.title}: {repeats} rounds")
        start, before = time.perf_counter(), foreign_work()
        seconds = take_turns(runs, repeats, REST)
        others = (foreign_work() - before) / (time.perf_counter() - start)
        results.append(summary(phase, config, 4, seconds) | {"compared": compared, "others_cores": round(others, 2)})
    return results


def agree(phase: Phase, runs: dict[str, Run], peer: Transformers, examples: list[Any]) -> str:
    """What was found equal; an error where the first two of `runs`, ours and the peer's, differ."""
    ours, theirs = list(runs.values())[:2]
    if phase.kind == "train":
        # The second loss is that of the updated weights. The third, after `agree`, is of no meaning: PyTorch's optimizers share weights.
        a, b = ([float(run()[1]) for _ in range(2)] for run in (ours, theirs))
        difference = max(abs(x - y) for x, y in zip(a, b, strict=True))
        check(difference < 1e-5 * a[0], phase, f"losses {a} and {b}")
        return f"losses of two steps to {difference:.0e}"
    a, b = ours()[1], theirs()[1]
    if phase.kind == "decode":
        close = peer.margins(phase, examples) < 1e-3  # rounding may decide there, and what follows is another text
        clear = ~close.cumsum(axis=1).astype(bool)
        check(bool((a == b)[clear].all()), phase, "tokens differ where the likeliest is clear")
        return f"{clear.sum()} of {clear.size} tokens, before the first close decision"
    difference = float(abs(a - b).max())
    check(difference < 1e-4, phase, f"logits differ by {difference:.1e}")
    return f"logits to {difference:.0e}"


def check(holds: bool, phase: Phase, found: str) -> None:
    if not holds:
        raise RunError(f"{phase.title}: the two sides do not agree, so nothing was timed: {found}")


def one_by_one(config: BackboneConfig, phases: list[Phase], repeats: int, chip: Chip | None) -> tuple[list[Result], str | None]:
    """bfloat16 on an accelerator: one side, then the other, as their weights may not fit side by side. And why there is no peer."""
    import jax

    reason, device = peer_device(jax.default_backend())
    found = [seconds_of("blm_jax", config, phases, repeats, device)]
    gc.collect()
    if reason is None:
        found.append(seconds_of("transformers", config, phases, repeats, device))
    seconds = [{name: times for side in found for name, times in side[i].items()} for i in range(len(phases))]
    return [summary(phase, config, 2, times, chip) for phase, times in zip(phases, seconds, strict=True)], reason


def peer_device(backend: str) -> tuple[str | None, str]:
    """Why transformers can't run where we do, or None; and torch's name of that device."""
    import torch

    if backend == "gpu":
        return (None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"), "cuda"
    return (None if backend == "cpu" else f"torch does not run on {backend}"), "cpu"


def seconds_of(name: str, config: BackboneConfig, phases: list[Phase], repeats: int, device: str) -> list[dict[str, list[float]]]:
    """Of each phase on one side, whose memory is free again on return."""
    from _sides import Ours, Transformers, examples_of

    side: Ours | Transformers = Ours(config, "bfloat16") if name == Ours.name else Transformers(config, "bfloat16", device)
    seconds = []
    for phase in phases:
        progress(f"{phase.title}: {name}")
        runs = side.runs(phase, examples_of(phase, config))
        for run in runs.values():
            run()  # compiles
        seconds.append(take_turns(runs, repeats, 0))
    return seconds


# --- telling -------------------------------------------------------------------------------------------------------------


def summary(phase: Phase, config: BackboneConfig, itemsize: int, seconds: dict[str, list[float]], chip: Chip | None = None) -> Result:
    """Speeds of both sides, and how many times as fast ours is as the fastest of the others."""
    work, unit = work_of(phase, config, itemsize)
    limit = None if chip is None else chip.tflops if unit == "TFLOP/s" else chip.bandwidth / 1000
    sides = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        sides[name] = {
            "median_s": median,
            "min_s": min(times),
            "all_s": [round(time, 5) for time in times],
            "tokens_per_s": phase.tokens / median,
            unit: work / median / 1e12,
        }
        if limit is not None:
            sides[name]["of_peak"] = sides[name][unit] / limit
    result: Result = {"phase": phase.title, "sizes": asdict(phase), "sides": sides}
    ours, *peers = seconds
    if peers:
        peer = min(peers, key=lambda name: sides[name]["median_s"])
        rounds = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
        result["ratio"] = {
            "peer": peer,
            "median": sides[peer]["median_s"] / sides[ours]["median_s"],
            "min": sides[peer]["min_s"] / sides[ours]["min_s"],
            "rounds": [min(rounds), max(rounds)],
        }
    return result


def work_of(phase: Phase, config: BackboneConfig, itemsize: int) -> tuple[float, str]:
    """Of one run: bytes where memory is the limit, operations elsewhere; and the unit of a million million of them a second."""
    if phase.kind == "decode":
        contexts = range(phase.length + 1, phase.length + phase.new)
        return sum(decode_bytes(config.decoder, phase.rows, context, itemsize) for context in contexts), "TB/s"
    operations = vision_operations(config.vision, phase.pictures)
    if phase.kind != "vision":
        logits = phase.rows * phase.length if phase.kind == "train" else phase.rows
        operations += decoder_operations(config.decoder, phase.rows, phase.length, logits)
    return operations * (3 if phase.kind == "train" else 1), "TFLOP/s"  # backward is two products for each of forward's


def show(result: Result) -> None:
    size, device = f"{result['parameters'] / 1e6:.1f} M parameters", result["hardware"]["device"]
    print(f"\n{size}, {result['dtype']}, on {device}, {result['repeats']} rounds\n")
    print(f"{'':<30}{'median ms':>10}{'min ms':>10}{'tokens/s':>10}{'T/s':>8}{'of peak':>9}  ours is x times as fast (rounds)")
    for row in result["phases"]:
        print(row["phase"])
        ratio = row.get("ratio", {})
        for name, side in row["sides"].items():
            rate = side.get("TFLOP/s", side.get("TB/s"))
            peak = f"{side['of_peak']:>9.1%}" if "of_peak" in side else f"{'-':>9}"
            times = f"{1e3 * side['median_s']:>10.1f}{1e3 * side['min_s']:>10.1f}"
            versus = f"  {ratio['median']:.2f} ({ratio['rounds'][0]:.2f} to {ratio['rounds'][1]:.2f})" if name == ratio.get("peer") else ""
            print(f"  {name:<28}{times}{side['tokens_per_s']:>10.0f}{rate:>8.3f}{peak}{versus}")
    print("\nT/s: million million operations a second; in decode, bytes read")
    for note in result["notes"]:
        print(f"note: {note}")


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


def notes_of(dtype: str, rows: list[Result], no_peer: str | None) -> list[str]:
    notes = ["transformers runs eagerly, with PyTorch's sdpa for attention"]
    busy = max(row.get("others_cores", 0) for row in rows)
    if busy > 0.1:
        notes.append(f"other processes kept up to {busy:.1f} cores busy meanwhile: measure again on a quiet machine")
    if dtype == "float32" and "AMD" in cpu_name():
        notes.append("PyTorch multiplies by MKL, which takes a slower path on processors of AMD: on those of Intel expect lower ratios")
    if no_peer is not None:
        notes.append(f"transformers was not measured: {no_peer}")
    return notes


def progress(text: str) -> None:
    print(f"backbone: {text}", file=sys.stderr, flush=True)


# --- the command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> Result:
    args = parse(argv)
    if args.dtype == "float32":
        pin(args.threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its share of an accelerator
    config = config_of(args.size)
    phases = phases_of(args.size, args.dtype)
    no_peer = None
    if args.dtype == "float32":
        rows = side_by_side(config, phases, args.repeats)
    else:
        rows, no_peer = one_by_one(config, phases, args.repeats, peak_of(args))
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax", "flax", "optax", "torch", "transformers")},
        "size": args.size,
        "parameters": parameters(config),
        "dtype": args.dtype,
        "threads": args.threads if args.dtype == "float32" else None,
        "repeats": args.repeats,
        "phases": rows,
        "notes": notes_of(args.dtype, rows, no_peer),
    }
    show(result)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        name = "cpu" if args.dtype == "float32" else f"{args.size}_{result['hardware']['device'].lower().replace(' ', '_')}"
        temporary = RESULTS / f".backbone_{name}.json"
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(RESULTS / f"backbone_{name}.json")
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="blm bench backbone", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SMALL, *LARGE), default="100m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="cores for float32 (default: 2)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds (default: {REPEATS})")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="of a chip that is not in the table")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of its memory")
    parser.add_argument("--save", action="store_true", help=f"write the result to {RESULTS.name}/")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.threads < 1:
        raise RequestError("--repeats and --threads are at least 1")
    if args.size in LARGE and args.dtype == "float32":
        raise RequestError(f"--size {args.size} takes too long in float32, which is for a CPU: add --dtype bfloat16 on an accelerator")
    if (args.peak_tflops is None) != (args.bandwidth is None):
        raise RequestError("--peak-tflops and --bandwidth go together")
    return args


def pin(threads: int) -> None:
    """Both sides onto the same cores. XLA makes a thread for each core it may use, so this comes before jax is started."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise RequestError(f"--threads {threads}: there are {len(cores)} cores to run on")
    os.sched_setaffinity(0, cores[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import torch

    torch.set_num_threads(threads)


def peak_of(args: argparse.Namespace) -> Chip | None:
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu" and args.size in LARGE:
        raise RequestError(f"--size {args.size} is for an accelerator, and jax sees none here: install jax for it, or take --size 100m")
    if args.peak_tflops is not None:
        return Chip(args.peak_tflops, args.bandwidth)
    return chip_of(device.device_kind)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RequestError, RunError) as error:
        print(f"backbone: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, RequestError) else 1) from None
