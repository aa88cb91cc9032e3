"""Data workers need no JAX, no PyTorch and no transformers: everything here works where they cannot be imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
from PIL import Image

PROGRAM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "torch", "torchvision", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())

import importlib, pkgutil
import blm_jax.data
for module in pkgutil.walk_packages(blm_jax.data.__path__, "blm_jax.data."):
    importlib.import_module(module.name)

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.collate import collate
from blm_jax.data.pixels import read_pixel_config
from blm_jax.data.prompt import PromptEngine, user_turn

model, image, video = sys.argv[1:]
config = BackboneConfig(VisionConfig(2, 64, 4, 128, 64, (1,)), DecoderConfig(2, 64, 4, 2, 128, 151936, True, (2, 3, 3)))
engine = PromptEngine(config, load_tokenizer(model), read_pixel_config(model))
example = engine.encode([user_turn("What?", [image], [video]), {"role": "assistant", "content": "That"}])
batch = collate([[example]], config, row_multiple=2)
print(batch.tokens.shape[1], len(example.pictures), batch.vision.patches.shape[0])
"""


def test_data_works_without_jax(model_files: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 56
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((56, 56, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    arguments = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(model_files), str(tmp_path / "a.png"), str(tmp_path / "a.mp4")]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tokens, pictures, rows = map(int, done.stdout.split())
    assert tokens > 100 and pictures == 2 and rows % 2 == 0
