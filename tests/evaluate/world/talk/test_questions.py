"""Answers by another road: from the pictures' pixels, or from what things' places say."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from blm_jax.data import command
from blm_jax.data.corpora.corpus import open_corpus
from blm_jax.errors import RequestError
from blm_jax.evaluate.world import view
from blm_jax.evaluate.world.arms import ROBOTS, TABLE
from blm_jax.evaluate.world.render import look_at, project
from blm_jax.evaluate.world.talk import questions, talks
from blm_jax.evaluate.world.talk.questions import GRID, NAMES, NEAR, NEAR_STEPS, REGIONS, Asker, Case
from blm_jax.evaluate.world.talk.stills import Still, stills
from blm_jax.evaluate.world.talk.wordings import SPLITS, WORDINGS
from blm_jax.evaluate.world.tasks import COLOURS, PALETTE
from tests.data.corpora.material import open_engine
from tests.qwen_files import write_tokenizer_files

SCENES = 400


@functools.cache
def scenes() -> list[Still]:
    return list(itertools.islice(stills(0, "train"), SCENES))


def given(name: str, chosen: list[Still] | None = None) -> list[tuple[Still, Case]]:
    """All cases of a type, of which there must be many."""
    found = [(still, case) for still in (scenes() if chosen is None else chosen) for case in questions.cases(still) if case.type == name]
    assert len(found) >= 20, name
    return found


# --- what the pictures say -----------------------------------------------------------------------------------------------


def colour_of(pixels: np.ndarray, off_at_most: float = 0.3) -> np.ndarray:
    """The number of each pixel's colour by its hue and saturation, or -1 of what is grey or of no such colour."""
    values = pixels.astype(float) / 255
    bright = values.max(-1, keepdims=True)
    saturated = (bright - values.min(-1, keepdims=True))[..., 0] > 0.3 * bright[..., 0] + 0.08
    pure = PALETTE / PALETTE.max(-1, keepdims=True)
    off = np.abs(values[..., None, :] / np.maximum(bright, 0.05)[..., None, :] - pure).max(-1)
    return np.where(saturated & (off.min(-1) < off_at_most), off.argmin(-1), -1)


def lone(still: Still) -> list[int]:
    """Things whose colour no other has."""
    counts = Counter(thing.colour for thing in still.things)
    return [i for i, thing in enumerate(still.things) if counts[thing.colour] == 1]


def centre(still: Still, thing: int, camera: int = 0) -> np.ndarray:
    """Column and row of the middle of a lone thing's pixels."""
    rows, columns = np.nonzero(colour_of(still.pictures[camera]) == COLOURS.index(still.things[thing].colour))
    assert len(rows) >= 6
    return np.array([columns.mean(), rows.mean()]) + 0.5


def named(still: Still, name: str) -> int:
    [number] = [i for i, thing in enumerate(still.things) if name == f"the {thing.colour} {thing.noun}"]
    return number


def bare(apart: int = 10) -> list[Still]:
    """Scenes that nothing stands in, and where each thing can be told from all others in both pictures."""
    found = []
    for still in scenes():
        gaps = [np.abs(a.place - b.place).max() for a, b in itertools.combinations(still.things, 2)]
        if still.robot is None and min(gaps, default=99) > apart:
            found.append(still)
    return found


def marked(still: Still) -> np.ndarray | None:
    """Where both pictures see the green of a mark, if it is whole in both."""
    centres = []
    for picture in still.pictures:
        values = picture.astype(float) / 255
        bright = values.max(-1, keepdims=True)
        rows, columns = np.nonzero((np.abs(values / np.maximum(bright, 0.05) - np.array(view.GOAL_COLOUR)) < 0.12).all(-1))
        if len(rows) < 12 or max(np.ptp(rows), np.ptp(columns)) > 12 or min(rows.min(), columns.min()) == 0:
            return None
        centres.append(np.array([columns.mean(), rows.mean()]) + 0.5)
    return lines_meet(centres)


def triangulated(still: Still, thing: int) -> np.ndarray:
    return lines_meet([centre(still, thing, number) for number in range(len(view.CAMERAS))])


def lines_meet(centres: list[np.ndarray]) -> np.ndarray:
    """Where the lines of sight of both cameras come nearest to each other."""
    matrix, right = np.zeros((3, 3)), np.zeros(3)
    for middle, camera in zip(centres, view.CAMERAS.values(), strict=True):
        column, row = (middle / view.SIZE * 2 - 1) * np.tan(float(camera.field) / 2)
        ahead, aside, up = (np.asarray(axis, float) for axis in look_at(camera))
        ray = ahead + column * aside - row * up
        across = np.eye(3) - np.outer(ray, ray) / (ray @ ray)
        matrix += across
        right += across @ np.asarray(camera.position, float)
    return np.linalg.solve(matrix, right)


def test_colours_are_those_of_the_pixels() -> None:
    shown, most = [], []
    for still, case in given("colour"):
        [thing] = [thing for thing in still.things if case.words == (f"the {thing.noun}",)]
        column, row = thing.place.astype(int)
        window = colour_of(still.pictures[0][row - 3 : row + 4, column - 3 : column + 4])
        shown.append(COLOURS.index(case.answer) in window)
        if still.robot is None:
            most.append(Counter(window[window >= 0].tolist()).most_common(1)[0][0] == COLOURS.index(case.answer))
    assert np.mean(shown) > 0.95 and np.mean(most) > 0.95  # something else may hide the middle of what is seen


def patches(mask: np.ndarray) -> int:
    """Connected ones, but for a few pixels at an edge."""
    labels: Any = ndimage.label(mask, np.ones((3, 3)))
    return int((np.bincount(labels[0].ravel())[1:] >= 6).sum())


def test_counts_are_those_of_patches_of_colour() -> None:
    small = [still for still in bare(16) if all(thing.noun != "peg" for thing in still.things)]
    for still, case in given("count", small):
        painted = colour_of(still.pictures[0], 0.12)  # no edge, where a colour is mixed with the table's
        found = {colour: patches(painted == i) for i, colour in enumerate(COLOURS)}
        what = case.words[0].split()
        if what == ["things"]:
            assert int(case.answer) == sum(found.values())
        elif what[0] in COLOURS:
            assert int(case.answer) == found[what[0]]


def by_columns(still: Still, thing: int) -> float:
    return -float(centre(still, thing)[0])


def by_sight(still: Still, thing: int) -> float:
    return float(triangulated(still, thing)[0])


@pytest.mark.parametrize(("name", "measure", "clearly"), [("left", by_columns, 3), ("front", by_sight, 0.01)])
def test_left_and_front_are_as_the_pixels_lie(name: str, measure: Callable[[Still, int], float], clearly: float) -> None:
    told = Counter()
    for (still, which), (_, whether) in zip(given(name, bare()), given(f"is_{name}", bare()), strict=True):
        first, second = (named(still, words) for words in which.words)
        assert which.words == whether.words
        if {first, second} <= set(lone(still)):
            lead = measure(still, first) - measure(still, second)
            assert abs(lead) > clearly
            assert (lead > 0) == (whether.answer == "yes") == (which.answer == which.words[0])
            told[whether.answer] += 1
    assert min(told.values()) >= 8


def test_places_are_where_both_pictures_see_them() -> None:
    off, regions = [], []
    for still, case in given("place", bare()):
        thing = named(still, case.words[0])
        if thing in lone(still) and still.things[thing].noun != "peg":
            found = triangulated(still, thing)
            _, x, _, y = case.answer.split()
            off.append(np.abs(100 * found[:2] - [int(x), int(y)]).max())
            for region in (other for other in questions.cases(still) if other.type == "region" and other.words == case.words):
                row, column = int(np.digitize(found[0], questions.ROWS)), int(np.digitize(found[1], questions.COLUMNS))
                regions.append(region.answer == REGIONS[3 * row + column])
    assert len(off) >= 20 and len(regions) >= 15 and np.mean(regions) > 0.9
    # Centimetres, of which rounding is half a one; some are partly hidden by what lies before them.
    assert np.median(off) < 0.5 and np.quantile(off, 0.85) < 0.75


def test_marks_are_where_both_pictures_see_them() -> None:
    """Their green is of no thing; a mark in the air is at the place that is told."""
    off = []
    for still in scenes():
        if still.goal is not None and still.goal[2] > 0 and still.robot is None:
            [answer] = {case.answer for case in questions.cases(still) if case.type == "goal"}
            if (mark := marked(still)) is not None:
                off.append(np.abs(100 * mark - [int(number) for number in answer.split()[1::2]]).max())
    assert len(off) >= 15 and np.median(off) < 0.6


def test_points_are_where_the_pixels_are() -> None:
    off = []
    for still, case in given("pixel", bare()):
        thing = named(still, case.words[0])
        if thing in lone(still):
            point = np.array([int(number) for number in case.answer.split()])
            off.append(np.abs(centre(still, thing) * GRID / view.SIZE - 0.5 - point).max())
    assert len(off) >= 20
    assert np.median(off) < 0.6 and np.quantile(off, 0.85) < 1.0


def test_robots_are_told_by_their_colour() -> None:
    right = []
    for still, case in given("robot"):
        foot, _ = project(view.CAMERAS["front"], still.base + np.array([0.05, 0, 0.03], np.float32), view.SIZE)
        column, row = foot.astype(int)
        pixels = still.pictures[0][row, column - 3 : column + 4].reshape(-1, 3).astype(float)
        tones = TABLE["colour"] / TABLE["colour"].sum(-1, keepdims=True) / 4 + TABLE["colour"]  # hue and brightness
        seen = np.median(pixels, axis=0) / 255 / 0.85
        nearest = np.abs(tones - (seen / seen.sum() / 4 + seen)).sum(-1).argmin()
        right.append(case.answer == NAMES[ROBOTS[nearest]])
    assert np.mean(right) > 0.8  # the hand hides some


def test_nearer_is_measured_from_the_robot() -> None:
    for still, case in given("nearer"):
        first, second = (still.things[named(still, words)].position[:2] for words in case.words)
        away = [np.hypot(*(place - still.base[:2])) for place in (first, second)]
        assert case.answer == case.words[int(np.argmin(away))]


# --- what the hand does --------------------------------------------------------------------------------------------------


def dark_beside(still: Still, thing: int) -> int:
    """Pixels as dark as pads and palms are about a thing's middle."""
    column, row = still.things[thing].place.astype(int)
    window = still.pictures[0][max(row - 3, 0) : row + 2, max(column - 9, 0) : column + 10]
    return int(((window.max(-1) < 75) & (np.ptp(window.astype(int), axis=-1) < 20)).sum())


def test_steps_are_as_the_hand_and_the_thing_lie() -> None:
    steps: dict[str, list[Still]] = defaultdict(list)
    for still in scenes():
        if still.step is not None:
            steps[still.step].append(still)
    assert set(steps) == {"approach", "grasp", "lift", "move", "release"}
    dark = {step: np.array([dark_beside(still, 0) for still in chosen]) for step, chosen in steps.items()}
    near = np.concatenate([dark[step] for step in ("grasp", "lift", "move", "release")])
    assert (near >= 4).mean() > 0.95
    assert (dark["approach"] >= 4).mean() < 0.2
    for step, chosen in steps.items():
        for still in chosen:
            assert (still.held == 0) == (step in ("lift", "move", "release"))
            assert (still.around == 0) == (step == "grasp")
            assert (still.things[0].position[2] > 0.08) == (step == "move")
    white = {step: np.mean([on_target(still) for still in chosen]) for step, chosen in steps.items()}
    assert white["release"] > 0.9 and white["lift"] < 0.2


def on_target(still: Still, camera: int = 0) -> bool:
    """Whether the target's white is before and beside the first thing, in one picture."""
    found, _ = project(list(view.CAMERAS.values())[camera], still.things[0].position.astype(np.float32), view.SIZE)
    column, row = found.astype(int)
    below = still.pictures[camera][row + 4 : row + 8, max(column - 8, 0) : column + 9]
    return bool(below.size and (below.min(-1) > 200).mean() > 0.3)


def test_hands_are_where_it_is_dark() -> None:
    """About the palm, above the tips."""
    dark = []
    for still in scenes():
        if still.tip is not None:
            found, _ = project(view.CAMERAS["front"], still.tip + np.array([0, 0, 0.05]), view.SIZE)
            column, row = np.clip(found, 3, view.SIZE - 4).astype(int)
            window = still.pictures[0][row - 3 : row + 4, column - 3 : column + 4]
            dark.append(bool(((window.max(-1) < 75) & (np.ptp(window.astype(int), axis=-1) < 20)).any()))
    assert len(dark) >= 50 and np.mean(dark) > 0.95


def test_what_is_held_and_what_could_be() -> None:
    for still, case in given("held"):
        assert (case.answer == "yes") == (still.held == named(still, case.words[0]))
    for still, case in given("graspable"):
        assert still.held is None
        assert (case.answer == "yes") == (still.around == named(still, case.words[0]))


def test_success_is_where_things_ended() -> None:
    told, on_targets = Counter(), []
    for still, case in given("success"):
        first = still.things[0].position
        if still.task == "StackCube":
            on_top = abs(first[2] - still.things[1].position[2] - 0.04) < 0.002
            assert (case.answer == "yes") == on_top
        elif still.task == "LiftPegUpright":
            assert (case.answer == "yes") == (first[2] > 0.1)
        elif still.task in ("PushCube", "PullCube"):
            seen = on_target(still) or on_target(still, camera=1) or still.things[0].place[1] > view.SIZE - 8  # the hand hides one of them
            on_targets.append((case.answer == "yes") == seen)
        told[case.answer] += 1
    assert min(told.values()) >= 10
    assert len(on_targets) >= 10 and np.mean(on_targets) > 0.85  # a shadow may darken the target


# --- how they are asked --------------------------------------------------------------------------------------------------


@functools.cache
def asked(split: str) -> list[questions.Question]:
    asker = Asker(0, split)
    return [question for still in scenes() for question in asker.ask(still, 5)]


@pytest.mark.parametrize("split", SPLITS)
def test_no_answer_is_worth_guessing(split: str) -> None:
    answers: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for question in asked(split):
        answers[question.type, question.choices][question.answer] += 1
    assert {name for name, _ in answers} == set(WORDINGS) - {"between"}  # forks hang where there are no robots
    large = {key: counts for key, counts in answers.items() if counts.total() >= 40}
    assert len(large) >= 15
    for (name, choices), counts in large.items():
        if choices:
            by_letter = Counter({answer: count for answer, count in counts.items() if answer in questions.LETTERS})
            for part in (by_letter, counts - by_letter):
                assert part.total() < 30 or max(part.values()) / part.total() <= 1 / choices + 0.05, (name, part)
        else:
            assert max(counts.values()) <= 0.1 * counts.total()


def test_types_are_asked_alike_and_once_a_scene() -> None:
    asker = Asker(1, "train")
    for still in scenes()[:50]:
        types = [question.type for question in asker.ask(still, 5)]
        assert len(types) == len(set(types)) <= 5
    counts = Counter(question.type for question in asked("train"))
    assert max(counts.values()) <= 3 * min(counts.values())


def test_letters_name_the_right_answer() -> None:
    asker = Asker(2, "train")
    lettered = 0
    for still in scenes():
        right = defaultdict(set)
        for case in questions.cases(still):
            right[case.type].add(case.answer)
        for question in asker.ask(still, 20):
            if question.answer in questions.LETTERS and " A " in question.prompt:
                lettered += 1
                listed = question.prompt[question.prompt.rindex(" A ") :].rstrip("?.").replace(". answer with the letter", "")
                offered = dict(part.strip().split(" ", 1) for part in listed.split(", "))
                assert len(offered) == question.choices == len(set(offered.values()))
                assert offered[question.answer] in right[question.type]
    assert lettered > 100


def test_words_of_the_test_are_never_learned_from() -> None:
    for learned, held_out in WORDINGS.values():
        assert len(learned) >= 3 and len(held_out) >= 2
        assert not set(learned) & set(held_out)
    words = {word for learned, _ in WORDINGS.values() for wording in learned for word in re.findall(r"[a-z]+", wording)}
    unknown = {word for _, held_out in WORDINGS.values() for wording in held_out for word in re.findall(r"[a-z]+", wording)} - words
    assert len(unknown) <= 8  # other sentences, not another language


# --- what is written -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    for split, count in (("train", 12), ("test", 6)):
        talks.write(folder / split, count, 5, split)
        talks.write_sentences(folder / f"{split}_sentences", 40, 5, split)
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / talks.RECORDS).read_text().splitlines()]


def test_a_seed_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    talks.write(tmp_path / "again", 12, 5, "train")
    talks.write_sentences(tmp_path / "sentences", 40, 5, "train")

    def contents(path: Path) -> dict[str, bytes]:
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}

    assert contents(tmp_path / "again") == contents(written / "train")
    assert contents(tmp_path / "sentences") == contents(written / "train_sentences")
    assert not list(tmp_path.glob(".*"))


def test_splits_share_neither_pictures_nor_words(written: Path) -> None:
    pictures = {
        split: {hashlib.sha256(file.read_bytes()).digest() for file in (written / split / "pictures").iterdir()} for split in SPLITS
    }
    assert len(pictures["train"]) == 24 and len(pictures["test"]) == 12
    assert not pictures["train"] & pictures["test"]
    sentences = {split: {json.dumps(record["conversations"]) for record in records(written / f"{split}_sentences")} for split in SPLITS}
    assert not sentences["train"] & sentences["test"]


def test_records_say_what_type_a_question_is(written: Path) -> None:
    for record in records(written / "train"):
        turns = record["conversations"]
        assert len(record["types"]) == len(record["choices"]) == len(turns) / 2
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(record["types"])
        assert turns[0]["value"].startswith("<image><image>\n") and "<image>" not in turns[-2]["value"]
    assert max(len(record["types"]) for record in records(written / "train")) == talks.TURNS["train"]
    assert all(len(record["types"]) == 1 for record in records(written / "test"))


def test_data_prepare_reads_all_of_it(written: Path, tmp_path: Path) -> None:
    model = write_tokenizer_files(tmp_path / "model", max_pixels=view.SIZE**2)
    for name in ("train", "test", "train_sentences", "test_sentences"):
        source, out = written / name / talks.RECORDS, tmp_path / name
        result = command.prepare(str(source), functools.partial(open_engine, str(model)), str(out), workers=0, max_bad=0.0)
        assert (result["bad"], result["records"]) == (0, len(records(written / name)))
    example = open_corpus(tmp_path / "train")
    assert len(example) == 12


def test_sentences_are_right() -> None:
    numbers = {word: i for i, word in enumerate(talks.NUMBERS)}
    sums = 0
    for prompt, answer in itertools.islice(talks.sentences(0, "train"), 300):
        words = answer.rstrip(".").split()
        if "plus" in words:
            sums += 1
            assert numbers[words[0]] + numbers[words[2]] == numbers[words[4]]
            assert words[0] in prompt and words[2] in prompt.replace("?", "").replace(".", "")
        elif "larger" in words:
            assert numbers[words[0]] > numbers[words[4]]
    assert sums > 20


def test_bad_requests(written: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="exists; choose another directory"):
        talks.write(written / "train", 1, 0, "train")
    with pytest.raises(RequestError, match="'validation' is none of train, test"):
        talks.write(tmp_path / "x", 1, 0, "validation")
    with pytest.raises(RequestError, match="0 records are none"):
        talks.write_sentences(tmp_path / "x", 0, 0, "train")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_what_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(still: Still, draw: random.Random) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(talks, "descriptions", broken)
    with pytest.raises(KeyboardInterrupt):
        talks.write(tmp_path / "x", 5, 0, "train", robots=False)
    assert not list(tmp_path.iterdir())


def test_without_robots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Things, marks and forks; here every other scene is described: in steps of the first picture and in centimetres, in either order, and
    then named.
    """
    monkeypatch.setattr(talks, "DESCRIBED", 2)
    talks.write(tmp_path / "things", 24, 3, "train", robots=False)
    scenes, firsts, orders = stills(3, "train", robots=False), set(), set()
    for number, record in enumerate(records(tmp_path / "things")):
        still = next(scenes)
        assert still.robot is None and still.step is None and still.task is None
        assert not set(record["types"]) & {"robot", "held", "graspable", "next", "success", "nearer", "is_nearer"}
        leeway = {"pixel": NEAR_STEPS} | dict.fromkeys(("place", "goal", "tip"), NEAR)
        assert record["leeway"] == [leeway.get(name) for name in record["types"]]
        assert (record["types"] == ["list"] * 3) == (number % 2 == 0)
        if number % 2 == 0:
            said = {
                turn["value"].split("\n")[-1]: answer["value"] for turn, answer in zip(*2 * [iter(record["conversations"])], strict=True)
            }
            firsts.add(record["conversations"][0]["value"].split("\n")[-1])
            metric = said["what is on the table, in centimetres?"]
            assert said["what is on the table?"].count(",") == len(still.things) - 1
            points = [("goal", still.goal), ("fork", still.tip)]
            there = [
                f"{name} x {c[0]} y {c[1]} z {c[2]}" for name, at in points if at is not None for c in [np.round(100 * at).astype(int)]
            ]
            assert all(point in metric for point in there) and metric.count(",") == len(still.things) + len(there) - 1
            for thing in still.things:
                assert f"{thing.colour} {thing.noun} x {round(100 * float(thing.position[0]))} y" in metric
            [(words, names)] = [(words, answer) for words, answer in said.items() if words.startswith("name all things")]
            orders.add(words)
            axis = 0 if "left" in words else 2  # columns to the right, x to the front
            along = {f"{thing.colour} {thing.noun}": (*thing.place, *thing.position)[axis] for thing in still.things}
            if len(along) == len(still.things):
                told = [along[name] for name in names.split(", ")]
                assert told == sorted(told, reverse=words.endswith(("to left.", "to the back.")))
    assert len(firsts) == 2 and len(orders) == 4


def test_any_type_may_be_asked_first() -> None:
    """Or a model would learn what is asked from when it is asked."""
    asker, scenes = Asker(0, "train"), stills(0, "train")
    firsts = Counter(asked[0].type for _ in range(200) if (asked := asker.ask(next(scenes), 5)))
    assert len(firsts) >= 15 and firsts.most_common(1)[0][1] < 40
