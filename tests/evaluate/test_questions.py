"""`blm eval questions`: what counts as right, what it is compared with, and that no order or batch changes an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blm_jax.cli import main
from blm_jax.data.prompt import Example
from blm_jax.errors import RequestError
from blm_jax.evaluate import questions as asking
from blm_jax.evaluate.answers import distance, is_right
from blm_jax.evaluate.questions import Request, questions
from blm_jax.evaluate.world.talk import talks
from blm_jax.evaluate.world.talk.base import write_untrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base") / "untrained"
    write_untrained(path)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "test"
    talks.write(path, 8, 1, "test")
    return path


def records(source: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (source / talks.RECORDS).read_text().splitlines()]


class Knowing:
    """Answers as it is told to, and black pictures with a word of their own."""

    def __init__(self, engine: Any, answer_of: dict[str, str]):
        self.engine, self.answer_of = engine, answer_of

    def generate_batch(self, prompts: Sequence[Example], sampling: Any) -> list[Any]:
        def answer(prompt: Example) -> str:
            if prompt.pictures and not any(picture.raw.any() for picture in prompt.pictures):
                return "nothing"
            text = self.engine.tokenizer.decode(prompt.tokens.tolist())
            return next(said for asked, said in self.answer_of.items() if asked in text)

        return [SimpleNamespace(text=answer(prompt)) for prompt in prompts]


def test_who_knows_all_is_right(model: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [[turn["value"].split("\n")[-1] for turn in record["conversations"][-2:]] for record in records(source)]
    told = dict(asked)  # what is asked of two scenes has the later one's answer
    wrong = asked[0][0]
    monkeypatch.setattr(asking, "load", lambda path, mesh, compute, engine, backbone: Knowing(engine, {**told, wrong: "no idea"}))
    monkeypatch.setattr(asking, "BATCH", 3)
    found = questions(Request(model, str(source), out=str(tmp_path / "out")))
    count, right = len(asked), sum(told[question] == answer for question, answer in asked if not question.endswith(wrong))
    assert right > 0.8 * count
    assert found["all"]["questions"] == count == sum(one["questions"] for one in found["types"].values())
    assert found["all"]["right"] == pytest.approx(right / count)
    assert found["all"]["blind"] == 0
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in answers] == [record["conversations"][-1]["value"] for record in records(source)]
    assert all(one["question"] in record["conversations"][-2]["value"] for one, record in zip(answers, records(source), strict=True))
    saved = json.loads((tmp_path / "out" / "questions.json").read_text())
    assert saved["types"] == json.loads(json.dumps(found["types"])) and (tmp_path / "out" / "questions.md").read_text().startswith("# blm")


def test_the_commonest_answer(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"conversations": [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": answer}], "types": ["parity"]}
        for number, answer in ((1, "odd"), (2, "even"), (3, "Odd."), (4, "even"), (5, "odd"))
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(asking, "load", lambda *given: Knowing(given[3], {"?": "even"}))
    found = questions(Request(model, str(tmp_path / "a.jsonl")))["types"]["parity"]
    assert (found["right"], found["blind"], found["majority"], found["majority_answer"]) == (0.4, 0.4, 0.6, "odd")


def test_near_is_right() -> None:
    assert is_right("x 3 y -5", "x 4 y -4", leeway=2) and not is_right("x 3 y -5", "x 4 y -3", leeway=2)
    assert not is_right("x 3", "x 3 y 3", leeway=2) and not is_right("somewhere", "x 3 y 3", leeway=2)
    assert distance("10 20", "13 24") == pytest.approx(5) and distance("none", "1 2") is None
    assert is_right("Red. ", "red", None) and not is_right("red cube", "red", None)


def test_a_model_answers(model: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same alone and beside others; and a batch's fillers are not told of."""
    assert main(["eval", "questions", model, str(source), "--limit", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["all"]["questions"] == 5 and 0 <= told["all"]["right"] <= 1
    assert "text" not in told and np.isfinite(told["seconds"]["run"])


def test_bad_requests(model: str, tmp_path: Path) -> None:
    spoken = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "here"}], "types": ["place"], "leeway": [2]}
    (tmp_path / "a.jsonl").write_text(json.dumps(spoken) + "\n")
    with pytest.raises(RequestError, match=r"record 0 of .*a.jsonl: leeway is 2, but the answer 'here' has no number"):
        questions(Request(model, str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl").write_text('{"conversations": []}\n')
    with pytest.raises(RequestError, match=r"record 0 of .*b.jsonl: conversations is a list of turns"):
        questions(Request(model, str(tmp_path / "b.jsonl")))
    with pytest.raises(RequestError, match="does not exist"):
        questions(Request(model, str(tmp_path / "none")))
