"""Names in a text, and what they mean; and that the first blocks of the small base learn to look there."""

from __future__ import annotations

import itertools
import random

import jax
import numpy as np
import pytest

from blm_jax.evaluate.world import render, view
from blm_jax.evaluate.world.talk import base, eyes, finding, fitting
from blm_jax.evaluate.world.talk.stills import NOUNS, Still, Thing, stills


def thing(colour: str, noun: str, x: float, y: float) -> Thing:
    position = np.array([x, y, 0.02], np.float32)
    return Thing(noun, colour, position, render.project(view.CAMERAS["front"], position, view.SIZE)[0])


def scene(*things: Thing, goal: np.ndarray | None = None, tip: np.ndarray | None = None) -> Still:
    none = dict.fromkeys(("robot", "around", "held", "wanted", "step", "task", "instruction", "succeeded"))
    pictures, sizes = np.zeros((2, view.SIZE, view.SIZE, 3), np.uint8), np.full((2, len(things) + 1), 50)
    return Still(pictures=pictures, things=things, sizes=sizes, goal=goal, tip=tip, base=np.zeros(3), **none)


STILL = scene(
    thing("red", "cube", 0.1, 0.1),
    thing("red", "ball", -0.1, 0),
    thing("blue", "ball", 0, -0.1),
    goal=np.array([0.05, 0.1, 0.2]),
    tip=np.array([-0.1, -0.1, 0.1]),
)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("is the red cube left of the blue ball?", [("red cube", [0]), ("blue ball", [2])]),
        ("what colour is the cube?", [("cube", [0])]),
        ("what kind of thing is the blue thing?", [("thing", [0, 1, 2]), ("blue thing", [2])]),
        ("how many balls are there? and red things?", [("balls", [1, 2]), ("red things", [0, 1])]),
        ("bring the red ball to the target, or to the marked point", [("red ball", [1]), ("target", [3]), ("marked point", [3])]),
        ("where is the fork? and the green peg?", [("fork", [4]), ("green peg", [])]),
    ],
)
def test_what_names_mean(text: str, meant: list[tuple[str, list[int]]]) -> None:
    assert [(match.group(), finding.meant_by(STILL, match)) for match in finding.NAME.finditer(text)] == meant


def test_facts_are_those_of_the_scene() -> None:
    """Words for numbers, read back, are centimetres and steps of the first picture."""
    for number, (place, noun) in enumerate(eyes.shown(STILL)):
        facts = eyes.facts(STILL, number)
        column, row, *centimetres = facts.numbers
        np.testing.assert_allclose(np.array(centimetres) - eyes.FARTHEST, 100 * np.asarray(place), atol=0.5 + 1e-4)
        found, _ = render.project(view.CAMERAS["front"], np.asarray(place, np.float32), view.SIZE)
        assert [column, row] == [int(100 * step / view.SIZE) for step in found]
        assert facts.noun == noun and (facts.colour >= 0) == (noun < len(NOUNS))


def test_texts_name_what_is_there() -> None:
    """Most names mean one thing, each sort of name comes, and tokens are where the text has them."""
    words = base.tokenizer(0)
    engine, draw = base.engine_of(words), random.Random(0)
    kinds = np.zeros(3, int)  # things, marks and forks, counts
    side = view.SIZE // base.PIXELS.patch
    for still in itertools.islice(stills(3, "train", robots=False), 60):
        tokens, named = finding._told(still, draw, engine, side)
        for i in np.flatnonzero((named.one > 0) | (named.count >= 0)):
            word = words.decode([int(tokens[named.token[i]])]).strip()
            if named.count[i] >= 0:
                kinds[2] += 1
                assert word.rstrip("s") in (*NOUNS, "thing") and word.endswith("s")
                continue
            kinds[int(named.colour[i] < 0)] += 1
            assert word in (*NOUNS, "thing", "goal", "target", "point", "fork")
            cells = named.looks[i].reshape(2, side, side)
            for picture, camera in zip(cells, view.CAMERAS.values(), strict=True):
                place = named.place[i] * eyes.REACH + eyes.PALM * (word == "fork")
                found, _ = render.project(camera, place.astype(np.float32), view.SIZE)
                for row, column in np.argwhere(picture > 0):
                    assert np.all(np.abs(found / base.PIXELS.patch - (column + 0.5, row + 0.5)) <= 0.5 + 1e-3)
    assert (kinds >= 30).all(), kinds


def test_it_learns_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scenes seen often: names look at what they name; eyes, words and later blocks stay as they were."""
    monkeypatch.setattr(fitting, "TOLD", 30)
    for name, number in {"SCENES": 32, "ROWS": 16, "EPOCHS": 30, "COMPARING": 15}.items():
        monkeypatch.setattr(finding, name, number)
    words = base.tokenizer(0)
    config = base.config_of(words)
    params = base.looking(base.drawn(config, 0), config)
    learned, logs = finding.learn(params, config, base.engine_of(words), base.spoken(words), 0)
    first, last = logs["finding"][0], logs["finding"][-1]
    assert last["hit"] > 0.8 and last["looks"] < 0.7 * first["looks"]
    assert last["place"] < 0.8 * first["place"] and last["numbers"] < 0.9 * first["numbers"]
    assert set(logs["comparing"][0]) == {"step", "back", "count", "more"}
    blocks, others = learned["decoder"].pop("blocks"), learned
    before = {**params, "decoder": {**params["decoder"]}}
    first_blocks = before["decoder"].pop("blocks")
    jax.tree.map(np.testing.assert_array_equal, others, before)
    later = finding.COMPARES + 1
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[later:], old[later:]), blocks, first_blocks)
    for block in range(later):
        assert not np.allclose(blocks["q"]["kernel"][block], first_blocks["q"]["kernel"][block])
