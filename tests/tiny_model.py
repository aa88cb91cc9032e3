"""A small random Qwen2.5-VL in the Hub's layout, with the real vocabulary: `python -m tests.tiny_model DIRECTORY`.

Its answers mean nothing; everything that can be done with a real model can be done with it, without a download.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import GenerationConfig

from blm_jax.config import TokenConfig
from tests.models.oracle import CASES, torch_model
from tests.qwen_files import write_tokenizer_files

IM_END, END_OF_TEXT = 151645, 151643


def write_tiny_model(directory: Path) -> Path:
    case = CASES["tied"]
    config = replace(case, tokens=TokenConfig(), decoder=replace(case.decoder, vocab=151936, layers=2))
    model = torch_model(config, seed=3)
    model.generation_config = GenerationConfig(eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=END_OF_TEXT, repetition_penalty=1.05)
    model.save_pretrained(directory)
    write_tokenizer_files(directory, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 40)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 260, 3), np.uint8)).save(directory / "picture.png")
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m tests.tiny_model DIRECTORY")
    print(f"{write_tiny_model(Path(sys.argv[1]))}: a small random model, and picture.png to ask it about")
