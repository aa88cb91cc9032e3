"""The prompt engine of a MODEL, without its weights: a wrong request is known before they are read."""

from __future__ import annotations

from blm_jax.config import Instruction, PolicyConfig
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import read_pixel_config
from blm_jax.weights.policy import has_policy, read_policy
from blm_jax.weights.source import assets_dir, read_config


def open_engine(path: str) -> PromptEngine:
    assets = assets_dir(path)
    return PromptEngine(read_config(path), load_tokenizer(assets), read_pixel_config(assets))


def instruction_of(path: str) -> Instruction:
    """Where the policy of a MODEL reads the instruction; of one that has none, where a new policy would."""
    return read_policy(path).config.instruction if has_policy(path) else PolicyConfig.instruction
