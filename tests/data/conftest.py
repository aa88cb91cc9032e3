from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.data.chat import Tokenizer, load_tokenizer
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import PixelConfig, read_pixel_config
from blm_jax.weights.config_json import to_json
from tests.data.corpora.material import CONFIG
from tests.qwen_files import write_tokenizer_files


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_files(tmp_path_factory.mktemp("qwen"), max_pixels=28 * 28 * 64)


@pytest.fixture(scope="session")
def model(model_files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A MODEL without weights: nothing that asks for this one reads any."""
    directory = Path(shutil.copytree(model_files, tmp_path_factory.mktemp("model") / "qwen"))
    (directory / "config.json").write_text(json.dumps(to_json(CONFIG, "float32")))
    return str(directory)


@pytest.fixture(scope="session")
def tokenizer(model_files: Path) -> Tokenizer:
    return load_tokenizer(model_files)


@pytest.fixture(scope="session")
def pixels(model_files: Path) -> PixelConfig:
    return read_pixel_config(model_files)


@pytest.fixture(scope="session")
def backbone() -> BackboneConfig:
    vision = VisionConfig(layers=2, width=64, heads=4, ffn=128, out_width=64, full_attention_layers=(1,))
    decoder = DecoderConfig(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocab=151936, tied=True, mrope_section=(2, 3, 3))
    return BackboneConfig(vision, decoder)


@pytest.fixture(scope="session")
def engine(backbone: BackboneConfig, tokenizer: Tokenizer, pixels: PixelConfig) -> PromptEngine:
    return PromptEngine(backbone, tokenizer, pixels)
