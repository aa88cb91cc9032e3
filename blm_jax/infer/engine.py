"""The prompt engine of a MODEL, without its weights: a wrong request is known before they are read."""

from __future__ import annotations

from blm_jax.data.chat import load_tokenizer
from blm_jax.data.pixels import read_pixel_config
from blm_jax.data.prompt import PromptEngine
from blm_jax.weights.source import assets_dir, read_config


def open_engine(path: str) -> PromptEngine:
    assets = assets_dir(path)
    return PromptEngine(read_config(path), load_tokenizer(assets), read_pixel_config(assets))
