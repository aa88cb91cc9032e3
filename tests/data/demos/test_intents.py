"""Cached intents in files: what was written is read, and what is stale, unfinished or damaged is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from blm_jax.data.demos import intents as store
from blm_jax.data.demos.demonstrations import Demonstrations
from blm_jax.data.demos.intents import Form, Intents, Plan, open_intents
from blm_jax.data.demos.moments import Augmentation, Shape, key_of, open_moments, shape_of, used_frames
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.sets import open_set
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.augment import AugmentConfig
from blm_jax.errors import RequestError, RunError
from tests.data.demos.recordings import write
from tests.data.demos.stage_two import ARM, BACKBONE, POLICY, SMALL, Stage, hidden_of, make_stage, write_intents
from tests.data.test_no_jax import run

ONE = Augmentation(AugmentConfig(crop=0.1), seed=5, versions=1)
FORMS: tuple[Form, ...] = ("bfloat16", "float32", "int8")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Stage:
    return make_stage(tmp_path_factory.mktemp("sets"), model_files)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read(form: Form, stage: Stage, tmp_path: Path) -> None:
    """Shards of six frames; the fourth episode ends in one and the fifth begins there."""
    found = write_intents(tmp_path / "intents", stage, SMALL, replace(ONE, versions=2), form)
    frames = [6, 2, 10]  # of episodes of 5, 2 and 9 actions: no window looks ahead to the last observation of the second
    number = 0
    for version in range(2):
        for episode, count in enumerate(frames):
            for step in range(count):
                hidden, places = found.frame(0, episode, step, version)
                wanted = hidden_of(number, len(places))
                if form == "int8":
                    whole = np.abs(wanted).max(axis=1, keepdims=True) / 127
                    room = whole / 2 + np.abs(wanted) / 256  # the step, and what bfloat16 makes of it
                    assert (np.abs(hidden.astype(np.float32) - wanted) <= room).all()
                else:
                    np.testing.assert_array_equal(hidden.astype(np.float32), wanted)
                assert hidden.dtype == (np.float32 if form == "float32" else ml_dtypes.bfloat16)
                assert places[0].tolist() == [1, 0, 0, 0] and not places[-1].any()
                number += 1
    assert number == found.plan.frames == 36
    for missing in ((0, 1, 2, 0), (0, 0, 0, 2)):
        with pytest.raises(IndexError):
            found.frame(*missing)


def test_numbers_stand_beside_them(stage: Stage, tmp_path: Path) -> None:
    found = write_intents(tmp_path / "intents", stage, ARM, ONE)
    one = stage.open("my_arm", ahead=False)
    for number in range(2):
        state, action = found.numbers(0, number)
        episode = one.episode(number)
        np.testing.assert_array_equal(state, episode.state.astype(np.float32))  # LeRobot has none after the last action
        np.testing.assert_array_equal(action, episode.action.astype(np.float32))


def test_the_store_is_as_small_as_it_was_promised(stage: Stage, tmp_path: Path) -> None:
    """Of each frame intent alone, and places once for all."""
    sizes = {}
    for form in FORMS:
        found = write_intents(tmp_path / form, stage, SMALL, ONE, form)
        files = list((tmp_path / form).iterdir())
        tokens = sum(len(found.frame(0, episode, step, 0)[1]) for episode, count in enumerate([6, 2, 10]) for step in range(count))
        sizes[form] = sum(file.stat().st_size for file in files if file.name.startswith("hidden"))
        assert sizes[form] == tokens * store.token_bytes(form, POLICY.intent_width)
        assert not [file for file in files if file.name.startswith(("hidden-00000.npz", store.MAKING, "."))]
        with np.load(tmp_path / form / "layouts.npz") as layouts:
            assert len(layouts["tokens"]) <= 3  # instructions of different lengths, at most
    assert sizes["float32"] == 2 * sizes["bfloat16"] and sizes["int8"] < 0.54 * sizes["bfloat16"]


# --- stale -------------------------------------------------------------------------------------------------------------------


def with_pixels(engine: PromptEngine) -> PromptEngine:
    return PromptEngine(engine.config, engine.tokenizer, replace(engine.pixels, max_pixels=28 * 28 * 10))


def with_decoder(engine: PromptEngine, **changes: Any) -> PromptEngine:
    config = replace(engine.config, decoder=replace(engine.config.decoder, **changes))
    return PromptEngine(config, engine.tokenizer, engine.pixels)


def with_vision(engine: PromptEngine, **changes: Any) -> PromptEngine:
    config = replace(engine.config, vision=replace(engine.config.vision, **changes))
    return PromptEngine(config, engine.tokenizer, engine.pixels)


STALE: dict[str, tuple[str, Callable[[PromptEngine, Any], tuple[PromptEngine, Any]]]] = {
    "backbone": ("another backbone: make it again with blm data features", lambda engine, given: (engine, given | {"backbone": "sha256:"})),
    "rope": ("another backbone config: make", lambda engine, given: (with_decoder(engine, rope_theta=10_000.0), given)),
    "norm": ("another backbone config: make", lambda engine, given: (with_decoder(engine, norm_eps=1e-5), given)),
    "full attention": ("another backbone config: make", lambda engine, given: (with_vision(engine, full_attention_layers=(0,)), given)),
    "dtype": (r"another dtype \(float32, not bfloat16\)", lambda engine, given: (engine, given | {"dtype": "bfloat16"})),
    "processor": ("another processor: make", lambda engine, given: (with_pixels(engine), given)),
    "instruction": (
        r"another place of the instruction \(after, not before\)",
        lambda engine, given: (engine, given | {"policy": replace(POLICY, instruction="before")}),
    ),
    "robot": (
        "another robot entry: make",
        lambda engine, given: (engine, given | {"robot": replace(SMALL, cameras=(replace(SMALL.cameras[0], name="side"),))}),
    ),
    "block": (r"another block \(1, not 2\)", lambda engine, given: (engine, given | {"policy": replace(POLICY, intent_block=2)})),
    "augmentation": (
        r"another augmentation \(crop 0.1, seed 5, not crop 0.2, seed 5\)",
        lambda engine, given: (engine, given | {"augmentation": replace(ONE, changes=AugmentConfig(crop=0.2))}),
    ),
    "seed": (
        r"another augmentation \(crop 0.1, seed 5, not crop 0.1, seed 6\)",
        lambda engine, given: (engine, given | {"augmentation": replace(ONE, seed=6)}),
    ),
    "versions": (
        r"another number of versions \(1, not 2\)",
        lambda engine, given: (engine, given | {"augmentation": replace(ONE, versions=2)}),
    ),
}


@pytest.fixture(scope="module")
def fresh(stage: Stage) -> Intents:
    found = write_intents(stage.folder / "stale", stage, SMALL, ONE)
    found.check(key_of(stage.engine()(), POLICY, SMALL, BACKBONE, ONE, "float32"))
    return found


@pytest.mark.parametrize("what", STALE)
def test_a_stale_store_is_refused_by_the_name_of_what_changed(what: str, stage: Stage, fresh: Intents) -> None:
    said, change = STALE[what]
    plain = {"policy": POLICY, "robot": SMALL, "backbone": BACKBONE, "augmentation": ONE, "dtype": "float32"}
    engine, given = change(stage.engine()(), plain)
    with pytest.raises(RequestError, match=f"stale was made with {said}"):
        fresh.check(key_of(engine, **given))


def test_training_refuses_them(stage: Stage, tmp_path: Path) -> None:
    """At the door: another augmentation, a set that is none of theirs, one whose survey found other bad episodes."""
    found = write_intents(tmp_path / "intents", stage, SMALL, ONE)

    def opened(one: Demonstrations, augmentation: Augmentation, **more: str) -> None:
        settings: dict[str, Any] = {"batch": 2, "augmentation": augmentation, "intents": [found], "backbone": BACKBONE, **more}
        open_moments([one], stage.statistics, POLICY, stage.engine(), **settings)

    mine = stage.open("small", ahead=False)
    opened(mine, ONE)
    with pytest.raises(RequestError, match=r"another dtype \(float32, not bfloat16\)"):
        opened(mine, ONE, dtype="bfloat16")
    with pytest.raises(RequestError, match=r"another augmentation \(crop 0.1, seed 5, not none\)"):
        opened(mine, Augmentation())
    write(tmp_path / "other", SMALL, [4], "rlds")
    other = Demonstrations(open_set(tmp_path / "other"), SMALL, np.array([4]))
    with pytest.raises(RequestError, match=r"made with another set: .*other is none of its sets"):
        opened(other, ONE)
    with pytest.raises(RequestError, match=r"made with another survey of .*small, with other bad episodes"):
        opened(Demonstrations(mine.source, SMALL, np.array([5, 0, 9])), ONE)


# --- whole or not at all -----------------------------------------------------------------------------------------------------


def planned(stage: Stage, robot: Robot = SMALL, **changes: Any) -> tuple[Plan, np.ndarray, np.ndarray]:
    sets, state, action = used_frames([stage.open(robot.name, ahead=False)])
    key = key_of(stage.engine()(), POLICY, robot, BACKBONE, ONE, "float32")
    return replace(Plan(robot.name, key, "float32", POLICY.intent_width, 1, 6, sets), **changes), state, action


def frames(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((hidden_of(number, 3), np.zeros((3, 4), np.int32)) for number in range(count))


def test_a_shard_is_there_when_all_of_it_is(stage: Stage, tmp_path: Path) -> None:
    directory = epath.Path(tmp_path / "intents")
    plan, _, _ = planned(stage)
    store.begin(directory, plan)

    def broken() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_shard(directory, plan, 0, broken())
    assert [path.name for path in directory.iterdir()] == [store.MAKING] and not store.finished(directory, 0)
    with pytest.raises(RequestError, match="intents is not finished: run the same blm data features again, and it goes on"):
        open_intents(directory)
    with pytest.raises(RunError, match="an intent that is not finite, of frame 7"):
        bad = [(np.full((3, 64), value, np.float32), np.zeros((3, 4), np.int32)) for value in (1, np.nan)]
        store.write_shard(directory, plan, 1, bad)
    store.write_shard(directory, plan, 0, frames(6))
    assert store.finished(directory, 0) and not store.finished(directory, 1)
    store.begin(directory, plan)  # the same is gone on with
    for changes, said in (({"form": "int8"}, "another form"), ({"key": {**plan.key, "block": "7"}}, "another block")):
        with pytest.raises(RequestError, match=f"intents was begun with {said}: remove it, or choose another"):
            store.begin(directory, replace(plan, **changes))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(RequestError, match=r"mine holds letter.txt and no intents"):
        store.begin(epath.Path(tmp_path / "mine"), plan)
    with pytest.raises(RequestError, match=r"letter.txt is a file: choose a directory"):
        store.begin(epath.Path(tmp_path / "mine" / "letter.txt"), plan)


def test_what_is_damaged_is_said(stage: Stage, tmp_path: Path) -> None:
    found = write_intents(tmp_path / "intents", stage, SMALL, ONE)
    with pytest.raises(RequestError, match="intents exists; choose another directory"):
        store.check_new(epath.Path(tmp_path / "intents"))
    shard = tmp_path / "intents" / "hidden-00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(RunError, match=rf"hidden-00001.bin is damaged: it holds {len(data) - 1} of {len(data)} bytes; make it again"):
        found.frame(0, 2, 0, 0)
    shard.unlink()
    with pytest.raises(RunError, match=r"hidden-00001.bin is damaged: "):
        found.frame(0, 2, 0, 0)
    np.save(tmp_path / "intents" / "offsets.npy", np.zeros(3, np.int64))
    with pytest.raises(RunError, match="intents is damaged: its files do not hold 18 frames"):
        open_intents(tmp_path / "intents")
    info = tmp_path / "intents" / store.INFO
    info.write_text(json.dumps(json.loads(info.read_text()) | {"plan": {}}))
    with pytest.raises(RequestError, match="was edited, or is damaged: make it again"):
        open_intents(tmp_path / "intents")
    with pytest.raises(RequestError, match="nowhere holds no intents: make it again with blm data features"):
        open_intents(tmp_path / "nowhere")


def test_a_store_that_lost_a_part_is_damaged(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "intents"
    write_intents(path, stage, SMALL, ONE)
    layouts, info = path / "layouts.npz", path / store.INFO
    data = layouts.read_bytes()
    for broken in (b"", data[: len(data) // 2], b"PK" + data[:100], None):
        layouts.unlink() if broken is None else layouts.write_bytes(broken)
        with pytest.raises(RunError, match=r"layouts.npz is damaged: .*; make it again with blm data features"):
            open_intents(path)
    layouts.write_bytes(data)
    content = json.loads(info.read_text())
    for longest in ({}, {"longest": None}, {"longest": "much"}):
        info.write_text(json.dumps({name: value for name, value in content.items() if name != "longest"} | longest))
        with pytest.raises(RunError, match=r"intents.json is damaged: .*; make it again with blm data features"):
            open_intents(path)
    info.write_text(json.dumps(content))
    open_intents(path)


READ = """
from blm_jax.data.loader import Loader
from tests.data.demos.stage_two import POLICY, ROBOTS, Stage, write_intents, make_stage
from blm_jax.data.demos.moments import Augmentation
from pathlib import Path

model, folder = map(Path, sys.argv[1:])
stage = make_stage(folder, model)
plain = Augmentation(versions=1)
intents = [write_intents(folder / f"{name}.intents", stage, robot, plain, "bfloat16") for name, robot in ROBOTS.items()]
batch = next(Loader(stage.moments(augmentation=plain, intents=intents)))
print(*batch.seen.hidden.shape, int(batch.seen.mask.any(axis=1).all()))
"""


def test_no_jax_is_needed(model_files: Path, tmp_path: Path) -> None:
    found = run(READ, [str(model_files), str(tmp_path)])
    assert found[0] == 4 and found[2:] == [64, 1]


def test_prompts_have_room_for_all_robots(stage: Stage) -> None:
    """Of the sizes of their pictures: 64 pixels are brought to 56, 16x24 to 56x84 in patches of 14."""
    engine = stage.engine()()
    alone = [shape_of([robot], engine, "after", 8) for robot in (SMALL, ARM)]
    both = shape_of([SMALL, ARM], engine, "after", 8)
    assert both == Shape(max(one.length for one in alone), max(one.row_length for one in alone))
    assert shape_of([SMALL], engine, "after", 8 + 64).length == alone[0].length + 64
