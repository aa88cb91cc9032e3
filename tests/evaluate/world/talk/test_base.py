"""The small base: a MODEL as any other, drawn the same from the same seed, and eyes that learn what is in a picture and where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from blm_jax.cli import main
from blm_jax.config import ComputeConfig
from blm_jax.data.chat import load_tokenizer
from blm_jax.demo.story import CONFIGS
from blm_jax.evaluate.world.talk import base, eyes, fitting
from blm_jax.evaluate.world.talk.questions import Asker
from blm_jax.evaluate.world.talk.recipe import Part
from blm_jax.evaluate.world.talk.stills import stills
from blm_jax.models.layers import unstack
from blm_jax.models.mllm import with_params
from blm_jax.models.rope import text_rotary
from blm_jax.weights.source import read_config

RECIPE = CONFIGS / "base.yaml"
LARGEST = 10_000_000  # bytes: it is part of the package
PATCHES, SHOWING = 128, 40  # of two pictures, and which of them shows a thing
ASKED = 64  # words that look


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "untrained"
    base.write_untrained(path)
    return path


def test_it_is_a_model_as_any_other(untrained: Path) -> None:
    """transformers loads it, and finds every weight."""
    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(untrained, output_loading_info=True)
    model, told = loaded
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert 1e6 < model.num_parameters() < 3e6
    assert sum(file.stat().st_size for file in untrained.iterdir()) <= LARGEST
    words = AutoTokenizer.from_pretrained(untrained)
    chat = [{"role": "user", "content": "what is on the table? red cube x -7 y 12, 43 68, or 128"}]
    text = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert words(text).input_ids == load_tokenizer(untrained).encode(text)
    assert Qwen2VLImageProcessorPil.from_pretrained(untrained).patch_size == base.PIXELS.patch


def test_a_seed_gives_the_same_bytes(untrained: Path, tmp_path: Path) -> None:
    base.write_untrained(tmp_path / "again")
    base.write_untrained(tmp_path / "other", seed=1)
    for file in untrained.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (untrained / "model.safetensors").read_bytes()


def test_what_is_said_here_are_words_and_not_letters(untrained: Path) -> None:
    """Of training's questions: hardly more tokens than words and digits."""
    tokenizer = load_tokenizer(untrained)
    asker, scenes = Asker(0, "train"), stills(0, "train")
    texts = [text for _ in range(40) for question in asker.ask(next(scenes), 5) for text in (question.prompt, question.answer)]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    words = sum(len(re.findall(r"[a-zA-Z]+|-?\d+|[^\sa-zA-Z\d]", text)) for text in texts)
    assert tokens < 1.05 * words


def test_eyes_learn(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scenes seen often: their colours are told, and where things are; but for eyes and words all stays as it was."""
    monkeypatch.setattr(fitting, "TOLD", 20)
    config = read_config(untrained)
    params = base.drawn(config, 0)
    learned, log = eyes.learn(params, config, base.PIXELS, base.spoken(base.tokenizer(0)), Part(scenes=16, batch=8, steps=80, rate=2e-3), 0)
    first, last = log[0], log[-1]
    assert last["colour"] < 0.5 * first["colour"] and last["place"] < 0.8 * first["place"]
    assert last["there"] < first["there"] and last["numbers"] < 0.9 * first["numbers"]
    for part, tree in params.items():
        for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(learned[part]), strict=True):
            moved = np.abs(np.asarray(after) - np.asarray(before)).max() > 1e-3
            assert moved == (part == "vision" or "embed" in jax.tree_util.keystr(path)) or "norm" in jax.tree_util.keystr(path)
    json.dumps(log)


def test_bad_requests(untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before anything is learned."""
    assert main(["new", str(RECIPE), str(untrained)]) == 2
    assert f"{untrained} exists; choose another directory or remove it" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text(RECIPE.read_text().replace("steps: ", "step: ", 1))
    assert main(["new", str(tmp_path / "mine.yaml"), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "mine.yaml" in told and "did you mean steps" in told
    (tmp_path / "mine.yaml").write_text(RECIPE.read_text().replace("batch: ", "batch: 999999", 1))
    assert main(["new", str(tmp_path / "mine.yaml"), str(tmp_path / "out")]) == 2
    assert "eyes: " in (told := capsys.readouterr().err) and "batch is from 1 to scenes" in told
    assert main(["new", str(tmp_path / "none.yaml"), str(tmp_path / "out")]) == 2
    assert "none.yaml" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_half_of_the_heads_begin_by_looking_at_things() -> None:
    """Of many patches that show nothing one shows a thing: it is what they attend to, from near and far; the other heads do not care."""
    config = base.config_of(base.tokenizer(0))
    params = base.looking(base.drawn(config, 0), config)
    decoder = with_params(config, ComputeConfig(), params).decoder
    words = np.asarray(params["decoder"]["embed"]["embedding"])
    seen = np.random.default_rng(0).normal(size=(PATCHES, config.decoder.width)).astype(np.float32)
    seen[SHOWING] += 2 * words[config.tokens.image] / words[config.tokens.image].std()
    for away in (1, 30, 300):
        positions = np.r_[np.arange(PATCHES), np.full(ASKED, PATCHES + away)]
        rotary = text_rotary(jnp.broadcast_to(positions, (1, 3, len(positions))), config.decoder)
        for block in unstack(decoder.blocks):
            q, k, _ = block.project(jnp.concatenate([seen, words[:ASKED]])[None], rotary)
            scores = jnp.einsum("ahd,thd->hat", q[0, PATCHES:], k[0, :PATCHES]) / q.shape[-1] ** 0.5
            others, looking = np.split(np.asarray(jax.nn.softmax(scores)[..., SHOWING].mean(axis=1)) * PATCHES, 2)
            assert (looking > 4).all() and (others < 3).all(), (others, looking)
