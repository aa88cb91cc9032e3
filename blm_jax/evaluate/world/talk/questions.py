"""Questions about a still scene, with exact answers: what a model of the world should be able to say about what it sees.

Left, right, near and far are as the first picture shows them. A question is asked only where its answer is beyond doubt: by some pixels or
centimetres. Of all that could be asked, what has been answered least so far is asked next, so no answer is worth guessing.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.talk.stills import FORK, NOUNS, STEPS, Still, Thing
from blm_jax.evaluate.world.talk.wordings import CHOOSE, SPLITS, WORDINGS
from blm_jax.evaluate.world.tasks import COLOURS
from blm_jax.evaluate.world.view import SIZE

CLEARLY_LEFT = 6  # pixels
CLEARLY_NEARER = 0.03  # metres
ROWS, COLUMNS = (-0.06, 0.06), (-0.08, 0.08)  # x and y between regions of the table
CLEARLY_INSIDE = 0.01  # of a region
NEAR = 2  # centimetres
GRID = 100  # steps along either side of the first picture
NEAR_STEPS = 4  # of these: about as much, where things lie
COUNTS = ("0", "1", "2", "3")
YES_NO = ("yes", "no")
REGIONS = tuple(" ".join(words) for words in itertools.product(("far", "middle", "near"), ("left", "centre", "right")))
NAMES = {"panda": "Panda", "xarm6": "xArm 6", "xarm7": "xArm 7", "widowxai": "WidowX"}
HAND = "hand"
MARKS = ("the goal", "the target", "the marked point")
LETTERS = "ABCD"
TELLING = ("colour", "shape")  # types whose answers other questions tell by naming things: one of them a scene, and not of every scene
TELLING_LEFT_OUT = 0.4
CHOSEN = 0.3  # of those that may offer answers to choose from, do
LEEWAY = 2  # that an answer may be ahead of the rarest one of its type


@dataclass(frozen=True)
class Case:
    """A question before it has words, and its answer."""

    type: str
    answer: str
    words: tuple[str, ...] = ()  # for the wording's {0}, {1}
    options: tuple[str, ...] = ()  # what the answer is one of; none where it is free
    group: str | None = ""  # cases whose answers are balanced with this one's; None where options differ from case to case
    leeway: float | None = None  # of an answer in numbers: how far from it is still right


@dataclass(frozen=True)
class Question:
    type: str
    prompt: str
    answer: str
    choices: int  # 0 where the answer is free
    leeway: float | None = None


# --- what can be asked ---------------------------------------------------------------------------------------------------


def cases(still: Still) -> Iterator[Case]:
    for ask in (_of_pairs, _of_counts, _of_things, _of_the_arm):
        yield from ask(still)


def _of_pairs(still: Still) -> Iterator[Case]:
    for first, second in itertools.permutations(_named(still), 2):
        names = (_name(first), _name(second))
        tests = [
            ("left", second.place[0] - first.place[0], CLEARLY_LEFT),
            ("front", first.position[0] - second.position[0], CLEARLY_NEARER),
        ]
        if still.robot is not None:
            away = [float(np.linalg.norm((thing.position - still.base)[:2])) for thing in (first, second)]
            tests.append(("nearer", away[1] - away[0], CLEARLY_NEARER))
        for name, lead, clearly in tests:
            if abs(lead) >= clearly:
                yield Case(name, names[int(lead < 0)], names, names, None)
                yield Case(f"is_{name}", YES_NO[int(lead < 0)], names, YES_NO)


def _of_counts(still: Still) -> Iterator[Case]:
    # A mark or a bin might be counted too.
    if still.step is None and still.instruction is None and still.goal is None and len(still.things) < len(COUNTS):
        yield Case("count", str(len(still.things)), ("things",), COUNTS[1:], "all")
    colours, nouns = Counter(thing.colour for thing in still.things), Counter(thing.noun for thing in still.things)
    found = [
        *((f"{colour} things", colours[colour], "colours") for colour in COLOURS),
        *((f"{noun}s", nouns[noun], "nouns") for noun in NOUNS),
    ]
    yield from (Case("count", str(number), (words,), COUNTS, group) for words, number, group in found if number < len(COUNTS))


def _of_things(still: Still) -> Iterator[Case]:
    nouns, colours = Counter(thing.noun for thing in still.things), Counter(thing.colour for thing in still.things)
    for thing in still.things:
        if nouns[thing.noun] == 1:
            yield Case("colour", thing.colour, (f"the {thing.noun}",), COLOURS)
        if colours[thing.colour] == 1:
            yield Case("shape", thing.noun, (f"the {thing.colour} thing",), NOUNS)
    for thing in _named(still):
        words, (x, y) = (_name(thing),), thing.position[:2]
        if min(*(abs(x - bound) for bound in ROWS), *(abs(y - bound) for bound in COLUMNS)) >= CLEARLY_INSIDE:
            yield Case("region", REGIONS[3 * int(np.searchsorted(ROWS, x)) + int(np.searchsorted(COLUMNS, y))], words, REGIONS)
        yield Case("place", _place(thing), words, leeway=NEAR)
        yield Case("pixel", _pixel(thing), words, leeway=NEAR_STEPS)
    if still.goal is not None:
        yield from (Case("goal", _point(still.goal), (name,), leeway=NEAR) for name in MARKS)
    if still.tip is not None:
        yield Case("tip", _point(still.tip), (f"the {_end(still)}",), leeway=NEAR)
        if still.robot is None:
            yield from (Case("between", YES_NO[int(i != still.around)], (_name(still.things[i]),), YES_NO) for i in _named_numbers(still))


def _of_the_arm(still: Still) -> Iterator[Case]:
    if still.robot is None:
        return
    yield Case("robot", NAMES[still.robot], options=tuple(NAMES[robot] for robot in ROBOTS))
    for thing in _named(still):
        number, words = still.things.index(thing), (_name(thing),)
        yield Case("held", YES_NO[int(number != still.held)], words, YES_NO)
        if still.held is None:
            yield Case("graspable", YES_NO[int(number != still.around)], words, YES_NO)
        if still.step is not None and number == still.wanted:
            yield Case("next", still.step, words, STEPS)
    if still.instruction is not None and still.task is not None:
        yield Case("success", YES_NO[int(not still.succeeded)], (still.instruction,), YES_NO, still.task)


def _named(still: Still) -> list[Thing]:
    """The things that colour and shape tell from all others."""
    return [still.things[i] for i in _named_numbers(still)]


def _named_numbers(still: Still) -> list[int]:
    counts = Counter(map(_name, still.things))
    return [i for i, thing in enumerate(still.things) if counts[_name(thing)] == 1]


def _end(still: Still) -> str:
    """What arms and bars end in."""
    return FORK if still.robot is None else HAND


def _name(thing: Thing) -> str:
    return f"the {thing.colour} {thing.noun}"


def _pixel(thing: Thing) -> str:
    column, row = (int(GRID * float(step) / SIZE) for step in thing.place)
    return f"{column} {row}"


def _place(thing: Thing) -> str:
    x, y = (round(100 * float(metres)) for metres in thing.position[:2])
    return f"x {x} y {y}"


def _point(place: np.ndarray) -> str:
    x, y, z = (round(100 * float(metres)) for metres in place)
    return f"x {x} y {y} z {z}"


def descriptions(still: Still, draw: random.Random) -> list[tuple[str, str]]:
    """What to say and to answer of all things: where they are, in any order, so that which is named next is not to be guessed and where it
    is can only be seen; and their names, in the order in which they stand.
    """
    points = [("goal", still.goal), (_end(still), still.tip)]
    points = [f"{name} {_point(place)}" for name, place in points if place is not None]
    in_centimetres = [f"{thing.colour} {thing.noun} {_place(thing)}" for thing in still.things] + points
    in_pixels = [f"{thing.colour} {thing.noun} {_pixel(thing)}" for thing in still.things]
    said = [(DESCRIBE[0], in_pixels), (DESCRIBE[1], in_centimetres)]
    words, along = draw.choice(ORDER)
    ordered = ", ".join(f"{thing.colour} {thing.noun}" for thing in sorted(still.things, key=along))
    return [(words, ", ".join(draw.sample(told, len(told)))) for words, told in draw.sample(said, len(said))] + [(words, ordered)]


DESCRIBE = ("what is on the table?", "what is on the table, in centimetres?")
ORDER: tuple[tuple[str, Callable[[Thing], float]], ...] = (
    ("name all things from left to right.", lambda thing: float(thing.place[0])),
    ("name all things from right to left.", lambda thing: -float(thing.place[0])),
    ("name all things from the front to the back.", lambda thing: -float(thing.position[0])),
    ("name all things from the back to the front.", lambda thing: float(thing.position[0])),
)


# --- words ---------------------------------------------------------------------------------------------------------------

BY_LETTER = (
    "left",
    "front",
    "nearer",
    "count",
    "colour",
    "shape",
    "region",
    "robot",
    "next",
)  # types that may offer answers to choose from


class Asker:
    """Puts cases into words, and remembers what has been answered."""

    def __init__(self, seed: int, split: str):
        self._random = random.Random(f"{seed} {split}")
        self._split = SPLITS.index(split)
        self._asked: Counter[str] = Counter()  # by type
        self._answered: Counter[tuple[str, str]] = Counter()  # by type and group, and by letter

    def ask(self, still: Still, most: int, each: int = 1) -> list[Question]:
        """Some questions, `each` of a type at most: of the types, and with the answers, that were rarest so far."""
        by_type: dict[str, list[Case]] = {}
        for case in cases(still):
            by_type.setdefault(case.type, []).append(case)
        order = sorted(by_type, key=lambda name: (self._asked[name], self._random.random()))
        told = [name for name in order if name in TELLING]
        left_out = told if self._random.random() < TELLING_LEFT_OUT else told[1:]
        found: list[Question] = []
        for name in [name for name in order if name not in left_out] * each:
            tells = any(question.type == name for question in found) and name in TELLING
            if len(found) < most and not tells and (question := self._one(by_type[name])) is not None:
                self._asked[name] += 1
                found.append(question)
        # Any type may come first, or a model would learn what is asked from when it is asked; but what others tell comes before them.
        self._random.shuffle(found)
        return sorted(found, key=lambda question: question.type not in TELLING)

    def _one(self, given: list[Case]) -> Question | None:
        """Of these cases, which it then is none of."""
        if not given:
            return None
        self._random.shuffle(given)
        balanced = [case for case in given if case.group is not None and case.options]
        to_choose = given[0].type in BY_LETTER and self._random.random() < CHOSEN
        case = given[0]
        if balanced:
            # What is answered in words is balanced apart from what is answered by a letter.
            case = min(balanced, key=lambda case: self._ahead(case, to_choose))
            if self._ahead(case, to_choose) >= LEEWAY:
                return None
            for key in self._keys(case, to_choose):
                self._answered[key, case.answer] += 1
        given.remove(case)
        return self._to_choose(case) if to_choose else self._question(case, case.answer, len(case.options))

    def _ahead(self, case: Case, to_choose: bool) -> int:
        """How much more often its answer has been given than the rarest one, in its group or in its type."""
        keys = self._keys(case, to_choose)
        return max(self._answered[key, case.answer] - min(self._answered[key, other] for other in case.options) for key in keys)

    def _keys(self, case: Case, to_choose: bool) -> tuple[str, str]:
        of_type = f"{case.type} {len(case.options)} {to_choose}"
        return of_type, f"{of_type} {case.group}"

    def _to_choose(self, case: Case) -> Question:
        """From up to four answers, by their letters, which are balanced too."""
        letters = LETTERS[: len(case.options)]
        key = f"{case.type} of {len(letters)}"
        letter = min(letters, key=lambda letter: (self._answered[key, letter], self._random.random()))
        self._answered[key, letter] += 1
        offered = self._random.sample([option for option in case.options if option != case.answer], len(letters) - 1)
        offered.insert(letters.index(letter), case.answer)
        said = ", ".join(f"{sign} {option}" for sign, option in zip(letters, offered, strict=True))
        return self._question(case, letter, len(letters), said)

    def _question(self, case: Case, answer: str, choices: int, said: str = "") -> Question:
        prompt = self._random.choice(WORDINGS[case.type][self._split]).format(*case.words)
        if said:
            prompt = self._random.choice(CHOOSE[self._split]).format(prompt, said)
        return Question(case.type, prompt, answer, choices, case.leeway)
