"""`blm demo` from its first command to its page, with very little of everything. Minutes, so it is run by `make test-long`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blm_jax.demo import command, story
from blm_jax.demo.story import Demo, Sizes
from blm_jax.evaluate.world.talk.base import write_untrained
from blm_jax.flags import parse

SMALL = Sizes(scenes=24, tests=4, sentences=12, demonstrations=(1,), episodes=1, controls=1)


@pytest.mark.long
def test_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_untrained(tmp_path / "base")
    monkeypatch.setattr(story, "BASE", tmp_path / "base")
    monkeypatch.setattr(story, "TASKS", ("PickCube", "PushCube"))
    ran: list[str] = []

    def run(words: list[str]) -> dict[str, Any]:
        ran.append(words[0])
        asked = parse([*words, "--json"])
        return asked.run(asked, 0) or {}

    asked = Demo(str(tmp_path / "demo"), sizes=SMALL, changes=("steps=2", "batch=2"))
    told = command.demo(asked, run)
    assert told["export"]["largest_difference"] <= command.ALIKE
    assert told["world"]["all"]["episodes"] == 8 and len(told["world"]["films"]) == 8
    assert [check["what"] for check in told["checks"]] == [what for what, *_ in command.AIMS]
    assert 0 <= told["questions"]["all"]["right"] <= 1 and told["stage_two"]["steps"] == 2
    page = Path(told["page"]).read_text()
    assert "PushCube" in page and "http" not in page.replace("http://www.w3.org", "")
    count = len(ran)
    again = command.demo(asked, run)
    assert len(ran) == count and again["world"] == told["world"] and again["questions"] == told["questions"]
    assert "holds" in command.as_text(told)
