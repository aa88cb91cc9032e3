"""Reading for training beside PyTorch's DataLoader, in one run: examples and megabytes a second, and memory that stays flat.

    blm bench data [--save]

Ours is the whole way from a prepared corpus to packed batches: a record's bytes, JPEG, resize, patches, chat template, tokens, positions,
layout. PyTorch's side is what anyone writes first, a Dataset that opens a file, decodes it, resizes it to the same size by the same
filter and makes a normalised tensor; text it leaves out. Both have the same pictures, the same number of workers, and batches of as
many examples. The sides take turns.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import _harness
import numpy as np
from _harness import Result, progress
from PIL import Image

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.data import command
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.corpora.packed import PackedRows, open_packed
from blm_jax.data.loader import Loader
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import PixelConfig, fit_size, read_pixel_config
from blm_jax.errors import RequestError

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH = 480, 640
LENGTH, BATCH = 4096, 4  # tokens of a sequence, sequences of a batch
WORKERS = (0, 1, 2)
# What is read does not depend on layers; its shapes are those of Qwen2.5-VL.
SHAPES = BackboneConfig(
    VisionConfig(layers=1, width=64, heads=4, ffn=64, out_width=64, full_attention_layers=(0,)),
    DecoderConfig(layers=1, width=64, heads=4, kv_heads=2, ffn=64, vocab=152064, tied=True, mrope_section=(2, 3, 3)),
)


def open_engine(model: str) -> PromptEngine:
    return PromptEngine(SHAPES, load_tokenizer(model), read_pixel_config(model))


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs with large shapes and fine grain, about as many bytes a pixel as photographs have."""
    paths = []
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (HEIGHT // 32, WIDTH // 32, 3), np.uint8))
        shapes = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-12, 13, (HEIGHT, WIDTH, 1), np.int16)
        paths.append(folder / f"{number:05}.jpg")
        Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=85)
    return paths


def write_corpus(folder: Path, paths: list[Path]) -> tuple[str, str]:
    """A model's files and a corpus of one question a picture."""
    sys.path.insert(0, str(ROOT))
    from tests.data.corpora.material import asked, write_lines
    from tests.qwen_files import write_tokenizer_files

    model = str(write_tokenizer_files(folder / "model", max_pixels=PixelConfig().max_pixels))
    records = (asked("<image>\nWhat can be seen here?", "Shapes, and grain on them. " * 4, image=path.name) for path in paths)
    source = write_lines(paths[0].parent / "records.jsonl", records)
    command.prepare(str(source), functools.partial(open_engine, model), str(folder / "corpus"))
    return model, str(folder / "corpus")


# --- the two sides -------------------------------------------------------------------------------------------------------

Counted = Generator[int, None, None]  # examples of each batch


def ours(rows: PackedRows, workers: int) -> tuple[Counted, Callable[[], None]]:
    loader = Loader(rows, workers=workers)

    def batches() -> Counted:
        for batch in loader:
            yield int(batch.segments.max(axis=1).sum())

    return batches(), loader.close


def theirs(paths: list[Path], examples: int, workers: int) -> tuple[Counted, Callable[[], None]]:
    """`examples` a batch, shuffled."""
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __init__(self) -> None:
            config = PixelConfig()
            height, width = fit_size(HEIGHT, WIDTH, config.factor, config.min_pixels, config.max_pixels)
            self.size = width, height
            self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            image = Image.open(paths[index]).convert("RGB").resize(self.size, Image.Resampling.BICUBIC)
            values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
            return values.sub_(self.mean).div_(self.std)

    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2} if workers else {}
    loader = torch.utils.data.DataLoader(
        Pictures(), batch_size=examples, shuffle=True, drop_last=len(paths) >= examples, num_workers=workers, **options
    )

    def batches() -> Counted:
        while True:
            for batch in loader:
                yield len(batch)

    made = batches()
    return made, made.close


# --- measuring -----------------------------------------------------------------------------------------------------------


def rate(side: tuple[Counted, Callable[[], None]], seconds: float) -> float:
    """Examples a second, once what was made ahead at the start is used up."""
    batches, close = side
    for _ in range(4):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += next(batches)
    taken = time.perf_counter() - start
    close()
    return count / taken


def resident() -> float:
    """MB that this process and those it started hold; what they share is counted once."""
    pages = 0.0
    for process in _family(os.getpid()):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        pages += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return pages / 1000


def _family(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task").glob("*/children")
    return [process] + [member for file in children for child in file.read_text().split() for member in _family(int(child))]


def memory(rows: PackedRows, examples: int, workers: int) -> Result:
    """MB at every twentieth of the way."""
    batches, close = ours(rows, workers)
    seen, marks = 0, []
    while seen < examples:
        seen += next(batches)
        if seen * 20 >= (len(marks) + 1) * examples:
            marks.append(round(resident(), 1))
    close()
    half = len(marks) // 2
    growth = statistics.median(marks[half:]) / statistics.median(marks[len(marks) // 10 : half]) - 1
    return {"workers": workers, "examples": seen, "resident_mb": marks, "growth_from_first_half_to_second": round(growth, 4)}


def main(argv: list[str]) -> Result:
    parser = argparse.ArgumentParser(prog="blm bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512, metavar="N", help="different ones (default: 512)")
    parser.add_argument("--seconds", type=float, default=10.0, help="a turn (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each side (default: 3)")
    parser.add_argument("--examples", type=int, default=20_000, metavar="N", help="over which memory is watched (default: 20000)")
    parser.add_argument("--save", action="store_true", help=f"write the result to {_harness.RESULTS.name}/")
    args = parser.parse_args(argv)
    if min(args.pictures, args.repeats, args.examples) < 1 or args.seconds <= 0:
        raise RequestError("--pictures, --repeats and --examples are at least 1, --seconds above 0")
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), args)
    print(table(result))
    if args.save:
        _harness.save("data", result)
    return result


def measure(folder: Path, args: argparse.Namespace) -> Result:
    import torch

    torch.set_num_threads(1)  # as its workers have
    (folder / "pictures").mkdir()
    progress(f"{args.pictures} pictures")
    paths = write_pictures(folder / "pictures", args.pictures)
    model, corpus = write_corpus(folder, paths)
    rows = open_packed({corpus: 1}, functools.partial(open_engine, model), length=LENGTH, batch=BATCH, plans=folder / "plans")
    examples = sum(len(part) for part in rows.sequences.rows(0))
    rates: dict[int, dict[str, list[float]]] = {workers: {"blm_jax": [], "PyTorch": []} for workers in WORKERS}
    for turn in range(args.repeats):
        for workers in WORKERS:
            progress(f"{workers} workers, turn {turn + 1} of {args.repeats}")
            rates[workers]["blm_jax"].append(rate(ours(rows, workers), args.seconds))
            rates[workers]["PyTorch"].append(rate(theirs(paths, examples, workers), args.seconds))
    progress(f"memory over {args.examples} examples")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {"cpu": _harness.cpu_name(), "cores": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "grain", "numpy", "pillow", "torch")},
        "picture": {"height": HEIGHT, "width": WIDTH, "bytes": round(statistics.mean(path.stat().st_size for path in paths))},
        "batch": {"sequences": BATCH, "tokens": LENGTH, "vision_row_length": rows.row_length, "examples": examples},
        "turns_of_seconds": args.seconds,
        "examples_per_second": {
            str(workers): {side: [round(rate, 1) for rate in found] for side, found in sides.items()} for workers, sides in rates.items()
        },
        "memory": memory(rows, args.examples, WORKERS[-1]),
    }


def table(result: Result) -> str:
    lines = [f"{'workers':>8}{'':16}{'examples/s':>12}{'MB/s':>8}   ours is x times as fast (turns)"]
    for workers, sides in result["examples_per_second"].items():
        ratios = [ours / theirs for ours, theirs in zip(sides["blm_jax"], sides["PyTorch"], strict=True)]
        for side, rates in sides.items():
            middle = statistics.median(rates)
            beside = ""
            if side == "PyTorch":
                beside = f"   {statistics.median(sides['blm_jax']) / middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            lines.append(f"{workers:>8}  {side:14}{middle:12.1f}{middle * result['picture']['bytes'] / 1e6:8.1f}{beside}")
    marks = result["memory"]
    lines.append(
        f"memory over {marks['examples']} examples with {marks['workers']} workers: {min(marks['resident_mb']):.0f} to "
        f"{max(marks['resident_mb']):.0f} MB, {100 * marks['growth_from_first_half_to_second']:+.1f} % from the first half to the second"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    _harness.run_as_script("data", main)
