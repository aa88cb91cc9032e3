"""How far our pixels lie from those of transformers' torchvision processors, which most deployments run.

    blm bench pixels [--out FILE]

Both resize by an antialiased bicubic filter, but round differently. Differences are in levels of a pixel, 0 to 255, after
undoing the normalisation. The PIL processor runs beside them: there the difference is to be 0.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blm_jax.data.files import one_line
from blm_jax.data.vision.pictures import Picture, prepare_picture
from blm_jax.data.vision.pixels import PixelConfig
from blm_jax.data.vision.video import prepare_video
from blm_jax.errors import RequestError

RESULT = Path(__file__).parent / "results" / "pixels.json"
CONFIG = PixelConfig()
Reference = Callable[[Any], np.ndarray]  # a picture or video -> patches


def sizes() -> list[tuple[int, int]]:
    """Fifty sizes, extreme aspects included."""
    extreme = [(1, 200), (200, 1), (3, 599), (1999, 10), (8, 1600), (1, 1), (27, 29), (14, 14), (28, 28), (56, 3000)]
    return extreme + [(int(h), int(w)) for h, w in np.random.default_rng(0).integers(4, 1500, (40, 2))]


def noise(height: int, width: int) -> np.ndarray:
    """The hardest case: nothing but edges."""
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), np.uint8)


def scene(height: int, width: int) -> np.ndarray:
    """Smooth shades, some edges and a little noise, as in a photograph."""
    random = np.random.default_rng(height * 10_000 + width)
    shades = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    edges = np.kron(random.integers(0, 2, (8, 8, 1)) * 60, np.ones((height // 8 + 1, width // 8 + 1, 1)))[:height, :width]
    return np.clip(np.asarray(shades) + edges + random.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def compare(inputs: Iterable[np.ndarray], ours: Callable[[np.ndarray], Picture], reference: Reference) -> dict[str, float]:
    deviation = 255 * np.array(CONFIG.std)[:, None]
    largest = total = count = our_seconds = their_seconds = 0.0
    for pixels in inputs:
        start = time.perf_counter()
        patches = ours(pixels).patches
        middle = time.perf_counter()
        expected = reference(pixels)
        our_seconds += middle - start
        their_seconds += time.perf_counter() - middle
        assert patches.shape == expected.shape, "the grids differ"
        levels = np.abs(patches - expected).reshape(len(patches), 3, -1) * deviation
        largest = max(largest, float(levels.max()))
        total += float(levels.sum())
        count += levels.size
    return {
        "max": round(largest, 3),
        "mean": round(total / count, 4),
        "our_seconds": round(our_seconds, 2),
        "their_seconds": round(their_seconds, 2),
    }


def measure() -> list[dict[str, Any]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    slow, fast = Qwen2VLImageProcessorPil(), Qwen2VLImageProcessor()
    video = Qwen2VLVideoProcessor(cap_pixels_per_frame=True)

    def picture_by(processor: Any) -> Reference:
        return lambda pixels: np.asarray(processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"])

    rows = []
    for kind, make in (("scenes", scene), ("noise", noise)):
        for name, processor in (("PIL", slow), ("torchvision", fast)):
            difference = compare((make(*size) for size in sizes()), lambda pixels: prepare_picture(pixels, CONFIG), picture_by(processor))
            rows.append({"input": f"50 pictures, {kind}", "reference": name, **difference})
        films = (np.stack([make(height, width + i)[:, :width] for i in range(4)]) for height, width in sizes()[10:20])
        by_video: Reference = lambda pixels: np.asarray(video([pixels], return_tensors="pt")["pixel_values_videos"])  # noqa: E731
        rows.append(
            {"input": f"10 videos, {kind}", "reference": "torchvision", **compare(films, lambda f: prepare_video(f, CONFIG), by_video)}
        )
    return rows


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="blm bench pixels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    arguments = parser.parse_args(argv)
    try:
        import torch
        import torchvision  # type: ignore[import-not-found]
    except Exception as error:
        raise RequestError(f"the torchvision processors cannot run here, so nothing was measured: {one_line(error)}") from None
    torch.set_num_threads(1)
    rows = measure()
    versions = {name: importlib.metadata.version(name) for name in ("blm-jax", "numpy", "pillow", "torch", "transformers")}
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores {platform.machine()}, one thread each",
        "versions": versions | {"torchvision": torchvision.__version__},
        "unit": "levels of a pixel, 0 to 255",
        "differences": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'input':<22}{'reference':<14}{'max':>8}{'mean':>9}{'ours s':>9}{'theirs s':>10}")
    for row in rows:
        print(
            f"{row['input']:<22}{row['reference']:<14}{row['max']:>8.3f}{row['mean']:>9.4f}{row['our_seconds']:>9.2f}{row['their_seconds']:>10.2f}"
        )
    return result


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RequestError as error:
        print(f"pixels: {error}", file=sys.stderr)
        raise SystemExit(2) from None
