"""What texts about a scene name: of each name the token that ends it, and what is true of what it means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.talk import eyes
from blm_jax.evaluate.world.talk.eyes import NUMBERS, REACH
from blm_jax.evaluate.world.talk.questions import CLEARLY_LEFT, CLEARLY_NEARER, MARKS
from blm_jax.evaluate.world.talk.stills import FORK, NOUNS, Still, Thing
from blm_jax.evaluate.world.view import CAMERAS

COUNTED = 6  # things of a kind, at most
RELATIONS = 3  # whether a thing is further left than the one before, in front of it, and in the fork
WORLD, TURN = 3, 2  # numbers of a place and of how a cube is turned

_COLOURS, _NOUNS = "|".join(tasks.COLOURS), "|".join(NOUNS)
_MARKS = "|".join(mark.removeprefix("the ") for mark in MARKS)
NAME = re.compile(rf"\b(?:(?P<colour>{_COLOURS}) )?(?:(?P<noun>{_NOUNS}|thing)(?P<many>s?)|(?P<mark>{_MARKS})|(?P<tip>{FORK}))\b")


class Named(NamedTuple):
    """What texts name, [..., names] each and what is said of it; what is not there has weight 0."""

    token: np.ndarray  # the last one of the name
    one: np.ndarray  # float32, 1 where it is a thing or a mark
    looks: np.ndarray  # [..., cameras] int32, which token of its picture shows it; -1 where none does
    colour: np.ndarray  # int32, -1 where there is none
    noun: np.ndarray
    place: np.ndarray  # [..., WORLD] in the world, in REACH
    turn: np.ndarray  # [..., TURN]
    numbers: np.ndarray  # [..., NUMBERS]
    count: np.ndarray  # int32 of things of a kind, -1 where it is not that
    before: np.ndarray  # the token of the name that it is compared with, -1 where there is none
    more: np.ndarray  # [..., RELATIONS] int32, -1 where it is not clear


def nothing(most: int) -> Named:
    """What a text without names names."""
    return Named(
        token=np.zeros(most, np.int32),
        one=np.zeros(most, np.float32),
        looks=np.full((most, len(CAMERAS)), -1, np.int32),
        colour=np.full(most, -1, np.int32),
        noun=np.zeros(most, np.int32),
        place=np.zeros((most, WORLD), np.float32),
        turn=np.zeros((most, TURN), np.float32),
        numbers=np.zeros((most, len(NUMBERS)), np.int32),
        count=np.full(most, -1, np.int32),
        before=np.full(most, -1, np.int32),
        more=np.full((most, RELATIONS), -1, np.int32),
    )


def spelled(words: Tokenizer) -> list[str]:
    """The text of each token: of the world's words, each is plain letters."""
    found = [words.id_to_token(number) or "" for number in range(words.get_vocab_size())]
    return [token if token.startswith("<|") else token.replace("Ġ", " ").replace("Ċ", "\n") for token in found]


def named(still: Still, tokens: Sequence[int], spelling: list[str], side: int, most: int) -> Named:
    """The first names in a text about a scene whose pictures are of side * side tokens."""
    text, ends = "", {}
    for i, token in enumerate(tokens):
        text += spelling[token]
        ends[len(text)] = i
    owned = [eyes.owners(still, number, side) for number in range(len(CAMERAS))]
    cells = {int(number): [_cell(owner, number) for owner in owned] for number in np.unique(owned)}
    if still.goal is not None:
        mark = [noun for _, noun in eyes.shown(still)].index(eyes.MARK)
        cells[mark] = [eyes.marked(still, number, side) for number in range(len(CAMERAS))]
    names, facts = nothing(most), {}
    last = None  # thing that was named, and its token
    found = [(ends[match.end()], match) for match in NAME.finditer(text) if match.end() in ends]
    for i, (token, match) in enumerate(found[:most]):
        names.token[i] = token
        meant = meant_by(still, match)
        if match["many"]:
            names.count[i] = min(len(meant), COUNTED)
        elif len(meant) == 1:
            number = meant[0]
            if number not in facts:
                facts[number] = eyes.facts(still, number)
            fact = facts[number]
            names.one[i], names.colour[i], names.noun[i] = 1, fact.colour, fact.noun
            names.place[i], names.turn[i], names.numbers[i] = fact.position / REACH, fact.turn, fact.numbers
            names.looks[i] = cells.get(number, -1)
            if number < len(still.things):
                if last is not None and last[0] != number:
                    names.before[i], names.more[i, :2] = last[1], _leads(still.things[number], still.things[last[0]])
                if still.tip is not None:
                    names.more[i, 2] = still.around == number
                last = number, token
    return names


def _cell(owner: np.ndarray, number: int) -> int:
    found = np.flatnonzero(owner == number)
    return int(found[0]) if len(found) else -1


def _leads(thing: Thing, other: Thing) -> list[int]:
    """Whether it is further left, and whether it is in front of the other one."""
    leads = ((other.place[0] - thing.place[0], CLEARLY_LEFT), (thing.position[0] - other.position[0], CLEARLY_NEARER))
    return [int(lead > 0) if abs(lead) >= clearly else -1 for lead, clearly in leads]


def meant_by(still: Still, match: re.Match[str]) -> list[int]:
    """All that a name may mean, as `eyes.shown` counts."""
    if match["mark"] or match["tip"]:
        wanted = eyes.MARK if match["mark"] else eyes.TIP
        return [i for i, (_, noun) in enumerate(eyes.shown(still)) if noun == wanted]
    colour, noun = match["colour"], match["noun"]
    return [i for i, thing in enumerate(still.things) if colour in (None, thing.colour) and noun in ("thing", thing.noun)]
