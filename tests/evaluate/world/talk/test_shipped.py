"""The small base that comes with the package: it is what its log tells of, and it sees, finds and tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blm_jax.demo.story import BASE
from blm_jax.evaluate.questions import Request, questions
from blm_jax.evaluate.world.talk import base, talks
from blm_jax.weights.fingerprint import fingerprint
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


def test_it_finds_what_is_named(log: dict[str, Any], tmp_path: Path) -> None:
    """In scenes and words that it never met, about as often as its log says; it does not know it without looking."""
    talks.write(tmp_path / "asked", SCENES, 7, "test", robots=False)
    found = questions(Request(str(BASE), str(tmp_path / "asked")))
    for name in ("place", "pixel"):
        told, now = log["questions"]["types"][name], found["types"][name]
        spread = (told["right"] * (1 - told["right"]) / now["questions"]) ** 0.5
        assert now["right"] >= told["right"] - 3 * spread and now["blind"] <= 0.2, (name, now)
    assert found["all"]["right"] > found["all"]["blind"] + 0.3
