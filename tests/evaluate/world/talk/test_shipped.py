"""The small base that comes with the package: it is what its log tells of, and it sees, finds and tells."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from blm_jax.demo.story import BASE
from blm_jax.evaluate.questions import Request, questions
from blm_jax.evaluate.world.talk import base, finding, talks
from blm_jax.evaluate.world.talk.recipe import Part
from blm_jax.models.mllm import abstract_params
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.load import load_params
from blm_jax.weights.source import read_config

LARGEST = 10_000_000  # bytes
SCENES = 40


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads(BASE.with_suffix(".json").read_text())


def test_it_is_what_its_log_tells_of(log: dict[str, Any]) -> None:
    """Nobody has changed shapes, words or pictures since it was trained."""
    assert fingerprint(BASE) == log["fingerprint"]
    words = base.tokenizer(0)
    assert read_config(BASE) == base.config_of(words)
    for name, content in base.assets_of(words).items():
        assert json.loads((BASE / name).read_bytes()) == json.loads(content) if name.endswith(".json") else content
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= LARGEST


def test_names_look_at_what_they_name() -> None:
    """In scenes that it never met: what it learned of answers has not made it forget this, which a policy lives on."""
    config, engine = base.config_of(base.tokenizer(0)), base.engine_of(base.tokenizer(0))
    params = load_params(BASE, abstract_params(config))
    told = finding._gathered(params, config, engine, Part(scenes=48, batch=0, steps=0, rate=0), seed=99)
    fixed = {name: part for name, part in params["decoder"].items() if name != "blocks"}
    blocks = jax.tree.map(lambda leaf: leaf[: finding.LOOKS + 1], params["decoder"]["blocks"])
    state = {"blocks": blocks, "heads": finding.new_heads(config.decoder.width)}
    ask = partial(finding._loss, config=config, start=finding.start_of(engine), spoken=base.spoken(base.tokenizer(0)))
    _, losses = jax.jit(ask)(state, fixed, told)
    assert losses["hit"] >= 0.8, losses


def test_it_finds_what_is_named(log: dict[str, Any], tmp_path: Path) -> None:
    """In scenes and words that it never met, about as often as its log says; it does not know it without looking."""
    talks.write(tmp_path / "asked", SCENES, 7, "test", robots=False)
    found = questions(Request(str(BASE), str(tmp_path / "asked")))
    for name in ("place", "pixel"):
        told, now = log["questions"]["types"][name], found["types"][name]
        spread = (told["right"] * (1 - told["right"]) / now["questions"]) ** 0.5
        assert now["right"] >= told["right"] - 3 * spread and now["blind"] <= 0.2, (name, now)
    assert found["all"]["right"] > found["all"]["blind"] + 0.3
