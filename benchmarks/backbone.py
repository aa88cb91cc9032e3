"""The backbone beside transformers in PyTorch, in one run.

    blm bench backbone [--save]                             on a CPU: one set of weights, outputs compared first, float32
    blm bench backbone --size 7b --dtype bfloat16           on an accelerator: random weights made there

In float32 both sides hold the same weights on the same CPU cores and take turns. A pause before each turn lets the threads of the
other side go to sleep. Nothing is timed before the outputs agree. In bfloat16 one side runs after the other, ours first, and
speeds are also given as parts of what the chip can do.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _harness
from _harness import Result, Run, check, progress

from blm_jax import configfile
from blm_jax.config import BackboneConfig, DecoderConfig, TokenConfig, VisionConfig
from blm_jax.counts import Chip, decode_bytes, decoder_operations, parameters, vision_operations

if TYPE_CHECKING:  # jax is imported once the threads are pinned
    from _sides import Phase, Transformers

CONFIGS = Path(__file__).parent.parent / "configs"
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


def config_of(size: str) -> BackboneConfig:
    if size in SMALL:
        return SMALL[size]
    return configfile.load(CONFIGS / "model" / f"qwen2_5_vl_{size}.yaml").model


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
        seconds, others = _harness.watched_turns(runs, repeats)
        results.append(summary(phase, config, 4, seconds) | {"compared": compared, "others_cores": others})
    return results


def agree(phase: Phase, runs: dict[str, Run], peer: Transformers, examples: list[Any]) -> str:
    """What was found equal; an error where the first two of `runs`, ours and the peer's, differ."""
    ours, theirs = list(runs.values())[:2]
    if phase.kind == "train":
        # The second loss is that of the updated weights. The third, after `agree`, is of no meaning: PyTorch's optimizers share weights.
        a, b = ([float(run()[1]) for _ in range(2)] for run in (ours, theirs))
        difference = max(abs(x - y) for x, y in zip(a, b, strict=True))
        check(difference < 1e-5 * a[0], phase.title, f"losses {a} and {b}")
        return f"losses of two steps to {difference:.0e}"
    a, b = ours()[1], theirs()[1]
    if phase.kind == "decode":
        close = peer.margins(phase, examples) < 1e-3  # rounding may decide there, and what follows is another text
        clear = ~close.cumsum(axis=1).astype(bool)
        check(bool((a == b)[clear].all()), phase.title, "tokens differ where the likeliest is clear")
        return f"{clear.sum()} of {clear.size} tokens, before the first close decision"
    difference = float(abs(a - b).max())
    check(difference < 1e-4, phase.title, f"logits differ by {difference:.1e}")
    return f"logits to {difference:.0e}"


def one_by_one(config: BackboneConfig, phases: list[Phase], repeats: int, chip: Chip | None) -> tuple[list[Result], str | None]:
    """bfloat16 on an accelerator: random weights made there. And why there is no peer."""
    import jax
    from _sides import Ours, Transformers, examples_of

    def make(side: Any, *device: str) -> Any:
        made = side(config, "bfloat16", *device)
        return lambda phase: made.runs(phase, examples_of(phase, config))

    reason, device = _harness.peer_device(jax.default_backend())
    sides = {Ours.name: partial(make, Ours)} | ({} if reason else {Transformers.name: partial(make, Transformers, device)})
    seconds = _harness.one_after_the_other(sides, phases, repeats)
    return [summary(phase, config, 2, times, chip) for phase, times in zip(phases, seconds, strict=True)], reason


# --- telling -------------------------------------------------------------------------------------------------------------


def summary(phase: Phase, config: BackboneConfig, itemsize: int, seconds: dict[str, list[float]], chip: Chip | None = None) -> Result:
    work, unit = work_of(phase, config, itemsize)
    limit = None if chip is None else chip.tflops if unit == "TFLOP/s" else chip.bandwidth / 1000
    sides = {}
    for name, times in seconds.items():
        side = sides[name] = _harness.times_of(times)
        side |= {"tokens_per_s": phase.tokens / side["median_s"], unit: work / side["median_s"] / 1e12}
        if limit is not None:
            side["of_peak"] = side[unit] / limit
    result: Result = {"phase": phase.title, "sizes": asdict(phase), "sides": sides}
    if ratio := _harness.ratio_of(seconds, next(iter(seconds))):
        result["ratio"] = ratio
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
        for name, side in row["sides"].items():
            rate = side.get("TFLOP/s", side.get("TB/s"))
            peak = f"{side['of_peak']:>9.1%}" if "of_peak" in side else f"{'-':>9}"
            times = f"{1e3 * side['median_s']:>10.1f}{1e3 * side['min_s']:>10.1f}"
            print(f"  {name:<28}{times}{side['tokens_per_s']:>10.0f}{rate:>8.3f}{peak}{_harness.versus(row.get('ratio'), name)}")
    print("\nT/s: million million operations a second; in decode, bytes read")
    for note in result["notes"]:
        print(f"note: {note}")


# --- the command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> Result:
    args = parse(argv)
    _harness.prepare(args)
    config = config_of(args.size)
    phases = phases_of(args.size, args.dtype)
    no_peer = None
    if args.dtype == "float32":
        rows = side_by_side(config, phases, args.repeats)
    else:
        rows, no_peer = one_by_one(config, phases, args.repeats, _harness.peak_of(args, LARGE, "100m"))
    notes = ["transformers runs eagerly, with PyTorch's sdpa for attention", *_harness.notes_of(args.dtype, rows, no_peer)]
    result = _harness.terms(args, ("optax", "torch", "transformers")) | {"parameters": parameters(config), "phases": rows, "notes": notes}
    show(result)
    if args.save:
        _harness.save(_harness.file_name("backbone", result), result)
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    args = _harness.parser_of("backbone", __doc__, (*SMALL, *LARGE), "100m").parse_args(argv)
    _harness.check_arguments(args, LARGE)
    return args


if __name__ == "__main__":
    _harness.run_as_script("backbone", main)
