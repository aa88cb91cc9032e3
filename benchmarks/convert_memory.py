"""Peak host memory and time of converting a 3B layout: Hub -> checkpoint -> Hub, each in a process of its own.

    blm bench convert_memory [--work DIR] [--out FILE]

Weights are random bits in bfloat16, made here. The bound is 3 GB of resident memory in both directions.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.errors import RunError
from blm_jax.weights.config_json import to_json
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.hub import INDEX
from blm_jax.weights.names import hub_tensors, table
from blm_jax.weights.safetensors_file import DTYPES, plan_files

LAYOUT_3B = BackboneConfig(
    VisionConfig(layers=32, width=1280, heads=16, ffn=3420, out_width=2048, full_attention_layers=(7, 15, 23, 31)),
    DecoderConfig(layers=36, width=2048, heads=16, kv_heads=2, ffn=11008, vocab=151936, tied=True),
)
BOUND = 3e9
RESULT = Path(__file__).parent / "results" / "convert_memory.json"
CONVERT = "import json, sys; from blm_jax.convert.command import convert; print(json.dumps(convert(*sys.argv[1:])))"


def write_random_hub(directory: Path, config: BackboneConfig, seed: int = 0) -> None:
    """Two files like the Hub's, in another order of tensors than export writes."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    shapes = {tensor.name: tensor.entry.hub_shape for tensor in sorted(hub_tensors(table(config)), key=lambda tensor: tensor.name)}
    plan = plan_files({name: (DTYPES["BF16"], shape) for name, shape in shapes.items()}, 4 * 10**9)
    for planned in plan:
        with open(directory / planned.name, "wb") as file:
            file.write(planned.header())
            left = planned.data_bytes
            while left:
                file.write(rng.bytes(min(left, 2**26)))
                left -= min(left, 2**26)
    homes = {name: planned.name for planned in plan for name in planned.tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    (directory / "config.json").write_text(json.dumps(to_json(config, "bfloat16")))


def measured(src: Path, dst: Path, to: str) -> dict[str, Any]:
    """One conversion, its seconds and the peak resident memory the kernel saw; mapped pages of files are counted too."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(src), str(dst), to], stdout=subprocess.PIPE)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RunError(f"converting to {to} failed")
    peak = usage.ru_maxrss * 1024
    seconds = time.monotonic() - started
    return {
        "to": to,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
        "gigabytes_per_second": round(answer["bytes"] / seconds / 1e9, 2),
        "files": answer["files"],
        "fingerprint": answer["fingerprint"],
    }


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="blm bench convert_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", help="where 23 GB fit for a while (default: the system's temporary directory)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=arguments.work))
    try:
        write_random_hub(work / "hub", LAYOUT_3B)
        size = sum(file.stat().st_size for file in (work / "hub").iterdir())
        runs = [measured(work / "hub", work / "checkpoint", "checkpoint"), measured(work / "checkpoint", work / "back", "hf")]
        prints = {fingerprint(epath.Path(work / name)) for name in ("hub", "back")} | {run["fingerprint"] for run in runs}
    finally:
        shutil.rmtree(work)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores {platform.machine()}, {memory / 2**30:.0f} GiB",
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "numpy", "tensorstore", "orbax-checkpoint")},
        "layout": "3B, bfloat16, random bits",
        "weights_bytes": size,
        "bound_bytes": BOUND,
        "runs": runs,
        "bit_identical": len(prints) == 1,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'to':<12}{'peak GB':>9}{'seconds':>9}{'GB/s':>7}{'files':>7}")
    for run in runs:
        print(f"{run['to']:<12}{run['peak_bytes'] / 1e9:>9.2f}{run['seconds']:>9.1f}{run['gigabytes_per_second']:>7.2f}{run['files']:>7}")
    print(f"bit identical: {result['bit_identical']}; bound {BOUND / 1e9:.0f} GB")
    if not result["bit_identical"] or any(run["peak_bytes"] > BOUND for run in runs):
        raise RunError("the bound does not hold, or bits changed on the way")
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        print(f"convert_memory: {error}", file=sys.stderr)
        raise SystemExit(1) from None
