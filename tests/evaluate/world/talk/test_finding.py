"""Names in a text, and what they mean; that the first blocks of the small base learn to look there, and go on when it learns to answer."""

from __future__ import annotations

import itertools
import random

import jax
import numpy as np
import pytest

from blm_jax.data.prompt import user_turn
from blm_jax.evaluate.world import render, view
from blm_jax.evaluate.world.talk import answering, base, eyes, finding, fitting, naming
from blm_jax.evaluate.world.talk.recipe import Part, Recipe
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
    assert [(match.group(), naming.meant_by(STILL, match)) for match in naming.NAME.finditer(text)] == meant


def test_facts_are_those_of_the_scene() -> None:
    """Words for numbers, read back, are centimetres and steps of the first picture."""
    for number, (place, noun) in enumerate(eyes.shown(STILL)):
        facts = eyes.facts(STILL, number)
        column, row, *centimetres = facts.numbers
        np.testing.assert_allclose(np.array(centimetres) - eyes.FARTHEST, 100 * np.asarray(place), atol=0.5 + 1e-4)
        found, _ = render.project(view.CAMERAS["front"], np.asarray(place, np.float32), view.SIZE)
        assert [column, row] == [int(100 * step / view.SIZE) for step in found]
        assert facts.noun == noun and (facts.colour >= 0) == (noun < len(NOUNS))


def test_a_thing_and_the_mark_it_is_brought_to_share_a_cell() -> None:
    """Eyes are told of both there, and both their names look there; a mark that is not seen is nowhere."""
    brought = thing("red", "cube", 0.05, 0)
    goal = brought.position + np.array([0, 0, 0.005])
    still = scene(brought, thing("blue", "ball", -0.1, 0.1), goal=goal)
    words, side = base.tokenizer(0), view.SIZE // base.PIXELS.patch
    tokens = words.encode("bring the red cube to the goal", add_special_tokens=False).ids
    named = naming.named(still, tokens, naming.spelled(words), side, 2)
    assert (named.looks[0] == named.looks[1]).all() and (named.looks >= 0).all()
    assert named.noun.tolist() == [0, eyes.MARK] and (named.one == 1).all()
    still.sizes[1, -1] = 0
    for camera, cell in enumerate(named.looks[0]):
        seen = eyes.cells_of(still, camera, side)
        assert seen.there[cell] and seen.meant.noun[cell] == 0
        np.testing.assert_allclose(seen.meant.place[cell, 2:] * eyes.REACH, brought.position, atol=1e-6)
        if camera == 0:
            assert seen.mark.cell == cell
            np.testing.assert_allclose(seen.mark.place[2:] * eyes.REACH, goal, atol=1e-6)
        else:
            assert seen.mark.cell == -1


def test_texts_name_what_is_there() -> None:
    """Most names mean one thing, each sort of name comes, and tokens are where the text has them."""
    words = base.tokenizer(0)
    spelling, draw = naming.spelled(words), random.Random(0)
    kinds, shown = np.zeros(3, int), 0  # things, marks and forks, counts
    side = view.SIZE // base.PIXELS.patch
    for still in itertools.islice(stills(3, "train", robots=False), 60):
        tokens = words.encode(finding.text_about(still, draw), add_special_tokens=False).ids
        named = naming.named(still, tokens, spelling, side, 20)
        for i in np.flatnonzero((named.one > 0) | (named.count >= 0)):
            word = words.decode([int(tokens[named.token[i]])]).strip()
            if named.count[i] >= 0:
                kinds[2] += 1
                assert word.rstrip("s") in (*NOUNS, "thing") and word.endswith("s")
                continue
            kinds[int(named.colour[i] < 0)] += 1
            assert word in (*NOUNS, "thing", "goal", "target", "point", "fork")
            for cell, camera in zip(named.looks[i], view.CAMERAS.values(), strict=True):
                place = named.place[i] * eyes.REACH + eyes.PALM * (word == "fork")
                found, _ = render.project(camera, place.astype(np.float32), view.SIZE)
                assert cell < 0 or (found // base.PIXELS.patch).tolist() == [cell % side, cell // side]
                shown += cell >= 0
    assert (kinds >= 30).all(), kinds
    assert shown > 1.8 * (kinds[0] + kinds[1])  # few are hidden from a camera


def test_it_learns_to_look_and_keeps_on_while_it_learns_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few scenes seen often. Finding leaves eyes, words and later blocks as they were; answering leaves eyes, and what names hold."""
    monkeypatch.setattr(fitting, "TOLD", 10)
    words = base.tokenizer(0)
    config, engine, spoken = base.config_of(words), base.engine_of(words), base.spoken(words)
    params = base.looking(base.drawn(config, 0), config)
    recipe = Recipe(Part(0, 0, 0, 0), Part(32, 16, 60, 2e-3), Part(8, 2, 40, 2e-3), keep_finding=0.3)
    found, heads, log = finding.learn(params, config, engine, spoken, recipe.finding, 0)
    first, last = log[0], log[-1]
    assert last["hit"] > 0.8 and last["looks"] < 0.7 * first["looks"]
    assert last["place"] < 0.8 * first["place"] and last["numbers"] < 0.9 * first["numbers"]
    for part, inner in (("vision", None), ("decoder", "embed"), ("decoder", "norm")):
        before, after = (tree[part] if inner is None else tree[part][inner] for tree in (params, found))
        jax.tree.map(np.testing.assert_array_equal, after, before)
    for before, after in zip(jax.tree.leaves(params["decoder"]["blocks"]), jax.tree.leaves(found["decoder"]["blocks"]), strict=True):
        np.testing.assert_array_equal(before[finding.LOOKS + 1 :], after[finding.LOOKS + 1 :])

    taught, log = answering.learn(found, heads, config, engine, spoken, recipe, 0)
    jax.tree.map(np.testing.assert_array_equal, taught["vision"], params["vision"])
    first, last = log[0], log[-1]
    assert last["answers"] < 0.8 * first["answers"] and last["sentences"] < 0.8 * first["sentences"]
    assert last["hit"] > 0.5 and last["place"] < 1.2 * first["place"]


def test_conversations_are_those_that_models_read() -> None:
    """Behind the pictures, tokens and answers are the prompt engine's own, and names stand where they are said."""
    words = base.tokenizer(0)
    engine = base.engine_of(words)
    write, length = answering.Writer(engine), finding.start_of(engine).length
    still = next(stills(3, "train", robots=False))
    thing, pictures = still.things[0], [np.zeros((view.SIZE, view.SIZE, 3), np.uint8)] * 2
    asked, answer, seen = f"where is the {thing.colour} {thing.noun}?", "x 1 y 2", set()
    for seed in range(8):
        row = write([(asked, answer), ("and the cube?", None)], still, random.Random(seed))
        for lead in ("", "\n"):
            said = {"role": "assistant", "content": answer}
            whole = engine.encode([user_turn(lead + asked, images=pictures), said, user_turn("and the cube?")])
            count = len(whole.tokens) - length
            if (row.tokens[:count] == whole.tokens[length:]).all() and (row.tokens[count:] == engine.config.tokens.pad).all():
                np.testing.assert_array_equal(row.answers[:count], whole.supervised[length:])
                assert words.decode([int(row.tokens[row.named.token[0]])]).strip() == thing.noun
                seen.add(lead)
    assert seen == {"", "\n"}  # a corpus has a line break there, an instruction none
