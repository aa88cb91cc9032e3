"""Acting beside the PyTorch module of an export, in one run: latency and chunks a second.

    blm bench act [--save]                                  on a CPU: one set of weights, actions compared first, float32
    blm bench act --size 7b --dtype bfloat16                on an accelerator: random weights made there

From what the processor gives (patches, tokens; or an intent made before) to normalised chunks. PyTorch takes part twice: as it is,
and compiled by torch.compile. Beside each row stand the operations and bytes that it needs at least, and on a known chip the
least time they take there.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import _harness
import backbone
from _harness import Result, check, progress

from blm_jax.config import BridgeConfig, DiTConfig, EmbodimentConfig, PolicyConfig
from blm_jax.counts import Chip, Work, acting

if TYPE_CHECKING:  # jax is imported once the threads are pinned
    from _acting import Case, Sizes

LARGE = ("3b", "7b")


def sizes_of(size: str) -> Sizes:
    """Two cameras: of 112 pixels on the CPU, of 224 at full size, whose policy has the sizes of GR00T N1.5's."""
    from _acting import Sizes

    whole = backbone.config_of(size)
    blocks = {"tiny": 1, "100m": 6, "3b": 18, "7b": 14}[size]
    below = replace(whole, decoder=replace(whole.decoder, layers=blocks, tied=True))
    policy = PolicyConfig(intent_block=blocks, intent_width=whole.decoder.width)
    if size == "100m":
        policy = replace(
            policy,
            bridge=BridgeConfig(queries=16, width=384, heads=6, ffn=1536),
            dit=DiTConfig(layers=8, heads=8, head_dim=48, ffn=1536, tap=4),
            embodiment=EmbodimentConfig(hidden=384),
        )
    if size == "tiny":
        policy = replace(
            policy,
            bridge=BridgeConfig(queries=3, blocks=1, width=32, heads=2, ffn=48),
            dit=DiTConfig(layers=2, heads=2, head_dim=16, ffn=48, tap=2, time_features=16),
            embodiment=EmbodimentConfig(hidden=24),
        )
    return Sizes(below, policy, cameras=2, patches=4 if size == "tiny" else 16 if size in LARGE else 8, words=24)


def cases_of(size: str) -> list[Case]:
    from _acting import Case

    many = 64 if size in LARGE else 2 if size == "tiny" else 8
    return [
        Case(1),
        Case(many),
        Case(1, intents=True),
        Case(many, intents=True),
        Case(1, 16, intents=True),
        Case(many, 16, intents=True),
        Case(1, intents=True, going_on="guided"),
        Case(1, intents=True, going_on="given"),
    ]


# --- measuring -----------------------------------------------------------------------------------------------------------


def side_by_side(sizes: Sizes, cases: list[Case], repeats: int, peers: tuple[bool, ...]) -> list[Result]:
    """float32 on the CPU: the same weights and noise, actions compared, then timed in turns. `peers`: compiled or not, each."""
    from _acting import Ours, Twin, lively_policy

    policy = lively_policy(sizes.policy)
    twins = [Twin(sizes, "float32", "cpu", policy, compiled=compiled) for compiled in peers]
    ours = Ours(sizes, "float32", twins[0].side.params(), policy)
    rows = []
    for case in cases:
        progress(f"{case.title}: compiling and comparing")
        runs = ours.runs(case)
        for twin in twins:
            runs |= twin.runs(case)
        made, *theirs = (run()[1] for run in runs.values())
        difference = max(float(abs(made - other).max()) for other in theirs)
        check(difference < 1e-4, case.title, f"actions differ by {difference:.1e}")
        progress(f"{case.title}: {repeats} rounds")
        seconds, others = _harness.watched_turns(runs, repeats)
        rows.append(summary(case, sizes, 4, seconds) | {"compared": f"actions to {difference:.0e}", "others_cores": others})
    return rows


def one_by_one(
    sizes: Sizes, cases: list[Case], repeats: int, peers: tuple[bool, ...], chip: Chip | None
) -> tuple[list[Result], str | None]:
    """bfloat16 on an accelerator: random weights made there. And why there is no peer."""
    import jax
    from _acting import Ours, Twin

    reason, device = _harness.peer_device(jax.default_backend())
    sides: dict[str, Any] = {Ours.name: lambda: Ours(sizes, "bfloat16").runs}
    if reason is None:
        for compiled in peers:
            make = partial(Twin, sizes, "bfloat16", device, compiled=compiled)
            sides[f"{Twin.name}, {'compiled' if compiled else 'eager'}"] = lambda make=make: make().runs
    seconds = _harness.one_after_the_other(sides, cases, repeats)
    return [summary(case, sizes, 2, times, chip) for case, times in zip(cases, seconds, strict=True)], reason


def work_of(case: Case, sizes: Sizes, itemsize: int) -> dict[str, Work]:
    rows = case.observations
    parts = acting(sizes.backbone, sizes.policy, rows, case.samples, sizes.pictures(rows), sizes.length, itemsize)
    return {name: parts[name] for name in (("bridge", "denoising") if case.intents else parts)}


# --- telling -------------------------------------------------------------------------------------------------------------


def summary(case: Case, sizes: Sizes, itemsize: int, seconds: dict[str, list[float]], chip: Chip | None = None) -> Result:
    parts = work_of(case, sizes, itemsize)
    operations, read = (sum(part[i] for part in parts.values()) for i in (0, 1))
    row: Result = {"phase": case.title, "case": asdict(case), "operations": operations, "bytes": read, "sides": {}}
    if chip is not None:
        row["bound_s"] = sum(part.seconds(chip) for part in parts.values())
    for name, times in seconds.items():
        side = row["sides"][name] = _harness.times_of(times)
        side["chunks_per_s"] = case.observations * case.samples / side["median_s"]
        side["tflops_per_s"] = operations / side["median_s"] / 1e12
        if chip is not None:
            side["times_bound"] = side["median_s"] / row["bound_s"]
    if ratio := _harness.ratio_of(seconds, next(iter(seconds))):
        row["ratio"] = ratio
    return row


def show(result: Result) -> None:
    print(f"\n{result['size']}, {result['dtype']}, on {result['hardware']['device']}, {result['repeats']} rounds\n")
    heads = f"{'median ms':>10}{'min ms':>10}{'chunks/s':>10}{'TFLOP/s':>9}{'x bound':>9}"
    print(f"{'':<30}{heads}  ours is x times as fast (rounds)")
    for row in result["phases"]:
        bound = f", at least {1e3 * row['bound_s']:.2f} ms" if "bound_s" in row else ""
        print(f"{row['phase']}: {row['operations'] / 1e9:.2f} GFLOP, {row['bytes'] / 1e6:.0f} MB{bound}")
        for name, side in row["sides"].items():
            times = f"{1e3 * side['median_s']:>10.2f}{1e3 * side['min_s']:>10.2f}{side['chunks_per_s']:>10.1f}{side['tflops_per_s']:>9.3f}"
            over = f"{side['times_bound']:>9.1f}" if "times_bound" in side else f"{'-':>9}"
            print(f"  {name:<28}{times}{over}{_harness.versus(row.get('ratio'), name)}")
    for note in result["notes"]:
        print(f"note: {note}")


def latency_note(rows: list[Result]) -> str:
    """What going on with the last chunk costs, beside one observation's chunk that does not."""
    ours = {
        row["case"]["going_on"]: 1e3 * next(iter(row["sides"].values()))["median_s"]
        for row in rows
        if row["case"]["intents"] and row["case"]["observations"] == row["case"]["samples"] == 1
    }
    extra = ", ".join(f"{how} {time - ours['']:+.2f} ms" for how, time in ours.items() if how)
    return f"going on with the last chunk adds to the {ours['']:.2f} ms of denoising one observation: {extra}"


# --- the command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> Result:
    args = parse(argv)
    _harness.prepare(args)
    sizes, cases, no_peer = sizes_of(args.size), cases_of(args.size), None
    peers = (False,) if args.eager else (False, True)
    if args.dtype == "float32":
        rows = side_by_side(sizes, cases, args.repeats, peers)
    else:
        rows, no_peer = one_by_one(sizes, cases, args.repeats, peers, _harness.peak_of(args, LARGE, "100m"))
    result = _harness.terms(args, ("torch", "transformers")) | {
        "model": {"backbone": asdict(sizes.backbone), "policy": asdict(sizes.policy)},
        "observation": {"cameras": sizes.cameras, "pixels": sizes.patches * sizes.backbone.vision.patch, "tokens": sizes.length},
        "phases": rows,
        "notes": [latency_note(rows), *_harness.notes_of(args.dtype, rows, no_peer)],
    }
    show(result)
    if args.save:
        _harness.save(_harness.file_name("act", result), result)
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _harness.parser_of("act", __doc__, ("tiny", "100m", *LARGE), "100m")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled PyTorch, which takes minutes to compile")
    args = parser.parse_args(argv)
    _harness.check_arguments(args, LARGE)
    return args


if __name__ == "__main__":
    _harness.run_as_script("act", main)
