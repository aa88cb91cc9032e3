"""Conversations about the world and plain sentences, as files that `blm data prepare` reads.

    PATH/records.jsonl       a record a line: conversations, and beside them the type of each question and how many answers it has
    PATH/pictures/           PNG, two a scene

Records of the split `test` hold one question each, of scenes and in words that `train` never has. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from tqdm import tqdm

from blm_jax.convert.output import Output
from blm_jax.convert.team import Team
from blm_jax.data.files import open_path
from blm_jax.errors import RequestError
from blm_jax.evaluate.world.talk.questions import Asker, Question, descriptions
from blm_jax.evaluate.world.talk.stills import Still, stills
from blm_jax.evaluate.world.talk.wordings import SPLITS
from blm_jax.evaluate.world.tasks import COLOURS
from blm_jax.evaluate.world.view import CAMERAS

RECORDS = "records.jsonl"
TURNS, EACH = {"train": 12, "test": 4}, {"train": 3, "test": 1}  # about a scene, and of these, of a type
DESCRIBED = 8  # of scenes that are learned from, every so manieth is described, and not asked about
SCENE_BYTES, SENTENCE_BYTES = 10_000, 300  # about as large as these become on disk

Record = dict[str, Any]


def write(path: epath.PathLike, count: int, seed: int, split: str, robots: bool = True) -> int:
    """Questions about so many scenes, into a directory that does not exist. How many questions there are.

    Some scenes that are learned from are described instead, all their things and where they are: each word of that is learned from, and
    only a model that finds what is named says it right, which all questions want.
    """
    from PIL import Image

    asker, scenes = Asker(seed, _known(split)), stills(seed, split, robots)
    draw, every = random.Random(f"{seed} {split} described"), DESCRIBED if split == "train" else 0
    questions = 0

    def records(directory: epath.Path) -> Iterator[Record]:
        nonlocal questions
        (directory / "pictures").mkdir()
        for number in tqdm(range(count), unit=" scenes", desc="questions", disable=None):
            if not every or number % every:
                still, asked = _next_asked(scenes, asker, split)
            else:  # and not asked about as well: the asker would take what nobody hears for answered
                still = next(scenes)
                asked = [Question("list", words, answer, 0) for words, answer in descriptions(still, draw)]
            names = [f"pictures/{number:06}_{camera}.png" for camera in CAMERAS]
            for name, picture in zip(names, still.pictures, strict=True):
                with (directory / name).open("wb") as file:
                    Image.fromarray(picture).save(file, "PNG", compress_level=1)
            questions += len(asked)
            yield from [_record(names, asked)] if split == "train" else (_record(names, [question]) for question in asked)

    _write_whole(path, count, SCENE_BYTES, records)
    return questions


def write_sentences(path: epath.PathLike, count: int, seed: int, split: str) -> None:
    """So many questions and answers without pictures, into a directory that does not exist."""
    made = sentences(seed, _known(split))
    _write_whole(path, count, SENTENCE_BYTES, lambda directory: (_spoken("sentence", *next(made)) for _ in range(count)))


def _next_asked(scenes: Iterator[Still], asker: Asker, split: str) -> tuple[Still, list[Question]]:
    while True:
        still = next(scenes)
        if asked := asker.ask(still, TURNS[split], EACH[split]):
            return still, asked


def _record(pictures: list[str], asked: list[Question]) -> Record:
    turns = []
    for i, question in enumerate(asked):
        turns.append({"from": "human", "value": ("<image>" * len(pictures) + "\n" if i == 0 else "") + question.prompt})
        turns.append({"from": "gpt", "value": question.answer})
    return {
        "images": pictures,
        "conversations": turns,
        "types": [question.type for question in asked],
        "choices": [question.choices for question in asked],
        "leeway": [question.leeway for question in asked],
    }


def _spoken(kind: str, prompt: str, answer: str) -> Record:
    return {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}], "types": [kind], "choices": [0]}


def _known(split: str) -> str:
    if split not in SPLITS:
        raise RequestError(f"the split {split!r} is none of {', '.join(SPLITS)}")
    return split


def _write_whole(path: epath.PathLike, count: int, size: int, records: Callable[[epath.Path], Iterator[Record]]) -> None:
    if count < 1:
        raise RequestError(f"{count} records are none: ask for at least one")
    with Output(open_path(path), count * size, Team()) as output, (output.directory / RECORDS).open("w") as file:
        for record in records(output.directory):
            file.write(json.dumps(record) + "\n")


# --- plain sentences -----------------------------------------------------------------------------------------------------

TOOLS = {"hand": "grasps", "arm": "moves", "camera": "sees", "robot": "works", "finger": "holds", "joint": "turns"}
TREATS = {
    "red": "apple",
    "green": "leaf",
    "blue": "sea",
    "yellow": "sun",
    "purple": "plum",
    "orange": "carrot",
    "cyan": "gem",
    "pink": "rose",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
HELD_OUT = 5  # every so manieth pair of numbers is asked in the test alone


def sentences(seed: int, split: str) -> Iterator[tuple[str, str]]:
    """Sums, colours, orders and small grammar, without end: what to say, and what to answer."""
    draw = random.Random(f"{seed} {split} sentences")
    kinds = (_sum, _larger, _colour_of, _order, _plural)
    while True:
        prompt, answer, number = draw.choice(kinds)(draw)
        if (number % HELD_OUT == 0) == (split == "test"):
            yield prompt, answer


def _sum(draw: random.Random) -> tuple[str, str, int]:
    a, b = draw.randrange(7), draw.randrange(6)
    words = draw.choice(("what is {0} plus {1}?", "{0} and {1} make how many?", "add {0} and {1}."))
    return words.format(NUMBERS[a], NUMBERS[b]), f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}.", 6 * a + b


def _larger(draw: random.Random) -> tuple[str, str, int]:
    a, b = draw.sample(range(len(NUMBERS)), 2)
    words = draw.choice(("which is larger, {0} or {1}?", "of {0} and {1}, which is more?"))
    return words.format(NUMBERS[a], NUMBERS[b]), f"{NUMBERS[max(a, b)]} is larger than {NUMBERS[min(a, b)]}.", a + b


def _colour_of(draw: random.Random) -> tuple[str, str, int]:
    number, times = draw.randrange(len(COLOURS)), draw.randrange(1, 5)
    colour = COLOURS[number]
    thing = TREATS[colour] + "s" * (times > 1)
    are = "are" if times > 1 else "is"
    return f"{NUMBERS[times]} {thing} {are} on the table. what colour {are} the {thing}?", f"the {thing} {are} {colour}.", number + times


def _order(draw: random.Random) -> tuple[str, str, int]:
    first, second, third = draw.sample(COLOURS, 3)
    said = f"the {first} cube is left of the {second} cube, and the {second} cube is left of the {third} cube."
    asked, answer = draw.choice((("leftmost", first), ("rightmost", third), ("in the middle", second)))
    return f"{said} which cube is {asked}?", f"the {answer} cube is {asked}.", COLOURS.index(first) + COLOURS.index(third)


def _plural(draw: random.Random) -> tuple[str, str, int]:
    number, times = draw.randrange(len(TOOLS)), draw.randrange(2, 7)
    noun, verb = list(TOOLS.items())[number]
    return f"one {noun} {verb}. and {NUMBERS[times]}?", f"{NUMBERS[times]} {noun}s {verb.removesuffix('s')}.", number + times
