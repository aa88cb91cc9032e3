"""The demo's page: everything that is told stands there as it was told, in one file that leads nowhere; what is not told is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from blm_jax.demo.page import FAILURES, RIGHT, WRONG, page
from blm_jax.evaluate.world.runs.report import summary

ROBOTS, TASKS = ("panda", "xarm6"), ("PickCube", "PushCube")
EVIL = "<script>alert('1 & 2')</script>"
VOID = {"meta", "img", "br", "circle", "polyline", "rect", "path"}


class Read(HTMLParser):
    """Elements with their attributes, and what is written; refuses what does not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        known = [{**found, "cls": found.get("class", "")} for name, found in self.elements if name == tag]
        return [found for found in known if wanted.items() <= found.items()]


def episodes(seed: int, share: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for robot in ROBOTS:
        for task in TASKS:
            for number in range(10):
                good = bool(rng.uniform() < share)
                rows.append(
                    {
                        "robot": robot,
                        "task": task,
                        "episode": number,
                        "success": good,
                        "once": good,
                        "right": good,
                        "steps": 20 if good else -1,
                    }
                )
    return rows


def answers() -> Iterator[dict[str, Any]]:
    for i in range(20):
        yield {
            "type": "colour",
            "question": f"What colour is thing {i}?",
            "answer": "red",
            "seen": "red" if i % 2 else "blue",
            "blind": "green",
        }
        where = {"type": "where", "question": f"Where is thing {i}?", "answer": "40 60", "blind": "50 50"}
        yield {**where, "seen": "41 60" if i % 2 else "70 60"}
    yield {"type": "text", "question": f"What is {EVIL}?", "answer": "a\x1b[2J sign", "seen": "A\x1b[2J sign.", "blind": ""}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    out = tmp_path_factory.mktemp("demo")
    (out / "world" / "films").mkdir(parents=True)
    Image.new("RGB", (60, 20), "red").save(out / "world" / "films.png")
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (8, 8), colour).save(out / f"{i}.png")
    moving = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green")]
    for i in range(9):
        moving[0].save(out / "world" / "films" / f"{i}.gif", save_all=True, append_images=moving[1:])
    for stage, rows in (
        ("stage_one", [{"step": s, "loss": 4 / s, "learning_rate": 1e-3} for s in (10, 20, 30)] + [{"step": 30, "held_out/loss": 0.25}]),
        (
            "stage_two",
            [{"step": s, "action": 2 / s, "future": None if s == 10 else 0.5} for s in (10, 20)] + [{"step": 20, "held_out/action": 0.3}],
        ),
    ):
        (out / stage).mkdir()
        (out / stage / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return epath.Path(out)


@pytest.fixture(scope="module")
def told(out: epath.Path) -> dict[str, Any]:
    types = {
        "colour": {"questions": 20, "right": 0.5, "blind": 0.125, "majority": 0.25, "majority_answer": "red"},
        "where": {
            "questions": 20,
            "right": 0.875,
            "blind": 0,
            "majority": 0.05,
            "majority_answer": "1 2",
            "median_off": 1.25,
            "leeway": 2.0,
        },
        "text": {"questions": 1, "right": 1.0, "blind": 0.0, "majority": 1.0, "majority_answer": "x"},
    }
    films = [
        {"robot": "panda", "task": "PickCube", "episode": i, "success": i < 2, "path": str(out / "world" / "films" / f"{i}.gif")}
        for i in range(9)
    ]
    films.append({**films[0], "path": "gone.gif"})
    found = {**summary(episodes(0, 0.8), ROBOTS, TASKS), "films": films, "sheet": "world/films.png"}
    controls = {name: summary(episodes(i, 0.1), ROBOTS, TASKS)["all"] for i, name in enumerate(("untrained", "blind", "two"))}
    return {
        "seed": 17,
        "from_scratch": False,
        "seconds": {"data": 61.25, "stage one": 200.5, EVIL: 3.0},
        "total_seconds": 724.6,
        "stage_one": {"run": "stage_one", "steps": 30},
        "stage_two": {"run": "stage_two", "steps": 20},
        "questions": {
            "model": "m",
            "source": "s",
            "types": types,
            "all": {"questions": 41, "right": 0.695, "blind": 0.0612, "majority": 0.1},
        },
        "answers": [{**one, "pictures": [f"{i % 3}.png"]} for i, one in enumerate(answers())],
        "world": found,
        "controls": controls,
        "export": {"path": f"out/{EVIL}", "largest_difference": 3.21e-6, "robots": ["panda"]},
        "commands": {"stage one": ["blm train a.yaml && echo <done>", "blm eval questions b"]},
        "versions": {"jax": "0.10.2"},
        "hardware": {"devices": "1 cpu", "mesh": {"data": 1, "fsdp": 2}},
        "checks": [
            {"what": "mean", "value": 0.8417, "bound": 0.8, "side": "least", "holds": True},
            {"what": "worst", "value": 0.25, "bound": 0.5, "side": "least", "holds": False},
            {"what": "PyTorch's", "value": None, "bound": 1e-4, "side": "most", "holds": False},
        ],
    }


@pytest.fixture(scope="module")
def read(told: dict[str, Any], out: epath.Path) -> Read:
    text = page(json.loads(json.dumps(told)), out)
    (out / "index.html").write_text(text)
    return Read(text)


def test_it_leads_nowhere(read: Read) -> None:
    for tag, given in read.elements:
        assert tag not in ("script", "link", "iframe", "base", "form", "object")
        assert not [name for name in given if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert given.get(name, "data:image/").startswith("data:image/")
    assert read.all("meta", name="viewport")


def test_numbers_stand_as_they_were_told(read: Read, told: dict[str, Any]) -> None:
    every = told["world"]["all"]
    for said in (
        "with seed 17",
        "12 min 5 s",
        f"{100 * every['success']:.1f} % of 40 episodes succeeded (95 %: {100 * every['low']:.1f} to {100 * every['high']:.1f})",
        "69.5 % of 41 held-out questions answered rightly; 6.1 % with black pictures",
        "3.2e-06 is the largest difference",
        "where 20 87.5 % 0.0 % 5.0 % 1.25, right up to 2",
        "colour 20 50.0 % 12.5 % 25.0 %",
        "in the end 0.133, of what was held out 0.25",
        "in the end 0.1, of what was held out 0.3",
        "In 30 steps",
        "61.2 s",
        "mean 0.842 at least 0.8 holds",
        "worst 0.25 at least 0.5 does not hold",
        "PyTorch's not measured at most 0.0001 does not hold",
        "blm eval questions b",
        "jax 0.10.2",
        "data 1, fsdp 2",
        "2 robots, 2 tasks, 40 new episodes",
    ):
        assert said in read.text, said
    for cell in told["world"]["cells"]:
        assert f"{100 * cell['success']:.0f} % {100 * cell['low']:.0f} to {100 * cell['high']:.0f}" in read.text
    for name in ("Not trained", "Not seeing", "Two cubes"):
        assert name in read.text
    assert "The other cube named" not in read.text


def test_curves_and_points(read: Read) -> None:
    lines, dots = read.all("polyline", cls="learned"), read.all("circle", cls="held")
    assert len(lines) == 3 and len(dots) == 2
    xs, ys = np.array([point.split(",") for point in lines[0]["points"].split()], float).T
    assert len(xs) == 3 and np.allclose(np.diff(xs), xs[0]) and (np.diff(ys) > 0).all()  # a lower loss is further down


def test_answers(read: Read) -> None:
    """Of numbers, those within the leeway are right; words are compared as the evaluation compares them."""
    assert len(read.all("article", cls="good")) == RIGHT and len(read.all("article", cls="bad")) == WRONG
    assert "It said 41 60 , which is right." in read.text and "It said 70 60 , which is wrong. Right is 40 60 ." in read.text
    assert "It said red , which is right." in read.text and "It said blue , which is wrong." in read.text
    assert "A\\x1b[2J sign. , which is right." in read.text and "\x1b" not in read.text


def test_pictures(read: Read, out: epath.Path) -> None:
    kinds = [found["src"].partition(";")[0] for found in read.all("img")]
    assert kinds.count("data:image/gif") == 2 + FAILURES and kinds.count("data:image/png") == 1 + RIGHT + WRONG
    assert "It failed, 6 of 7" in read.text and "It succeeded, " not in read.text
    assert all(found["alt"] for found in read.all("img"))


def test_what_is_told_stays_text(read: Read) -> None:
    assert EVIL in read.text  # as words, which the parser has unescaped
    assert "<done>" in read.text


@pytest.mark.parametrize(
    ("lacking", "title"),
    [
        ("stage_one", "Stage I: learning to see and to talk"),
        ("stage_two", "Stage II: learning to move"),
        ("questions", "Questions that it had never met"),
        ("answers", "Some of its answers"),
        ("world", "Episodes that it had never met"),
        ("controls", "Is it luck?"),
        ("export", "On to PyTorch"),
        ("checks", "What was checked"),
        ("seconds", "Where the time went"),
        ("commands", "The same by hand"),
    ],
)
def test_what_is_not_told_is_left_out(told: dict[str, Any], read: Read, out: epath.Path, lacking: str, title: str) -> None:
    assert title in read.text
    less = Read(page({name: part for name, part in told.items() if name != lacking}, out)).text
    assert title not in less and "12 min 5 s" in less


def test_of_nothing_much_is_said(out: epath.Path) -> None:
    read = Read(page({}, out))
    assert not read.all("section") and not read.all("img") and "What the demo did" in read.text


def test_not_compared(told: dict[str, Any], out: epath.Path) -> None:
    text = Read(page({**told, "export": {"path": "p", "largest_difference": None, "robots": []}}, out)).text
    assert "was not compared" in text and "differ by" not in text and "largest difference" not in text


def test_phones(read: Read) -> None:
    """What is wide is scaled, or scrolls in its own place."""
    assert all(re.fullmatch(r"0 0 \d+ \d+", found["viewbox"]) for found in read.all("svg"))
    depth = [i for i, (tag, _) in enumerate(read.elements) if tag == "table"]
    assert depth and all(read.elements[i - 1] == ("div", {"class": "scroll"}) for i in depth)
