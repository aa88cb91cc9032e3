"""Data workers need no JAX, no PyTorch and no transformers: everything here works where they cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.data.corpora.material import write_source
from tests.data.corpora.test_sources import write_examples

# Found, as if it were installed, but it cannot be imported.
BLOCK = """
import importlib.machinery, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "torch", "torchvision", "transformers", "tensorflow"):
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Block())
"""

PROGRAM = """
import importlib, pkgutil
import blm_jax.data
for module in pkgutil.walk_packages(blm_jax.data.__path__, "blm_jax.data."):
    importlib.import_module(module.name)

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.collate import collate
from blm_jax.data.vision.pixels import read_pixel_config
from blm_jax.data.prompt import PromptEngine, user_turn

model, image, video = sys.argv[1:]
config = BackboneConfig(VisionConfig(2, 64, 4, 128, 64, (1,)), DecoderConfig(2, 64, 4, 2, 128, 151936, True, (2, 3, 3)))
engine = PromptEngine(config, load_tokenizer(model), read_pixel_config(model))
example = engine.encode([user_turn("What?", [image], [video]), {"role": "assistant", "content": "That"}])
batch = collate([[example]], config, row_multiple=2)
print(batch.tokens.shape[1], len(example.pictures), batch.vision.patches.shape[0])
"""

CORPUS = """
from tests.data.corpora.material import open_engine
from blm_jax.data import command
from blm_jax.data.collate import collate
from blm_jax.data.corpora.corpus import open_corpus
from blm_jax.data.mixture import Mixture

model, out, *sources = sys.argv[1:]
engine = open_engine(model)
corpora = []
for number, source in enumerate(sources):
    command.prepare(source, lambda: engine, f"{out}/{number}", workers=0)
    command.show_corpus(f"{out}/{number}", engine, out=f"{out}/page{number}")
    corpora.append(open_corpus(f"{out}/{number}"))
mixture = Mixture([corpus.in_mixture() for corpus in corpora])
drawn = mixture.draws(0, 0)
examples = [corpora[corpus].example(int(record), engine) for corpus, record in zip(*mixture.locate(drawn))]
batch = collate([[example] for example in examples], engine.config)
print(len(drawn), int(batch.weights.sum() > 0), sum(len(example.tokens) for example in examples), mixture.work()[0])
"""


def run(program: str, arguments: list[str]) -> list[int]:
    """The numbers that a program prints where the packages cannot be imported."""
    command = [sys.executable, "-c", BLOCK + program, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_data_works_without_jax(model_files: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 56
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((56, 56, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    arguments = [str(model_files), str(tmp_path / "a.png"), str(tmp_path / "a.mp4")]
    tokens, pictures, rows = run(PROGRAM, arguments)
    assert tokens > 100 and pictures == 2 and rows % 2 == 0


def test_a_corpus_is_made_and_read_without_jax(model_files: Path, tmp_path: Path) -> None:
    """Of JSON lines, and of what tensorflow-datasets has prepared."""
    lines = write_source(tmp_path / "source", 12)
    examples = write_examples(tmp_path / "tfds")
    records, learned, tokens, known = run(CORPUS, [str(model_files), str(tmp_path), str(lines), f"tfds:{examples}"])
    assert (records, learned) == (12 + 3, 1) and tokens == known > 0
