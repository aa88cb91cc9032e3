"""Moments of demonstrations, row by row: what a row holds, online and from intents, and that it is the same wherever it is read."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blm_jax.batch import IntentRows, Moments, Prompts
from blm_jax.config import EmbodimentConfig
from blm_jax.data.collate import collate
from blm_jax.data.demos.demonstrations import training_rows
from blm_jax.data.demos.intents import Intents
from blm_jax.data.demos.moments import Augmentation, MomentRows, open_moments
from blm_jax.data.demos.observation import Observation, intent_tokens, messages_for
from blm_jax.data.loader import Loader
from blm_jax.data.vision.augment import AugmentConfig
from blm_jax.data.vision.pixels import levels_of
from blm_jax.errors import RequestError
from tests.data.corpora.test_packed import arrays
from tests.data.demos.stage_two import ARM, LENGTHS, POLICY, ROBOTS, SMALL, Stage, hidden_of, make_stage, write_intents

CHANGES = AugmentConfig(crop=0.3, brightness=0.3, contrast=0.2)
TWO = Augmentation(CHANGES, seed=3, versions=2)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Stage:
    return make_stage(tmp_path_factory.mktemp("sets"), model_files)


@pytest.fixture(scope="module")
def intents(stage: Stage) -> list[Intents]:
    return [write_intents(stage.folder / f"{name}.intents", stage, robot, TWO) for name, robot in ROBOTS.items()]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(one), arrays(other), strict=True))


def prompt_of(rows: MomentRows, robot: Any, state: np.ndarray, pictures: Any, instruction: str) -> Prompts:
    """By hand, of what Demonstrations says."""
    engine, shape = rows.views[0].prompter.engine, rows.views[0].prompter.shape  # pyright: ignore
    example = engine.encode(messages_for(Observation(state, pictures, instruction), robot, False), add_generation_prompt=True)
    levels = levels_of(engine.pixels)
    batch = collate([[example]], engine.config, length=shape.length, vision_row_length=shape.row_length, levels=levels)
    n = len(example.tokens)
    mask, places = intent_tokens(example, engine.config, POLICY.instruction)
    return Prompts(batch, np.pad(mask, (0, shape.length - n))[None], np.pad(places, ((0, shape.length - n), (0, 0)))[None].astype(np.int32))


def test_a_row_is_its_window(stage: Stage) -> None:
    rows = stage.moments()
    sets = stage.sets()
    met = set()
    for step in range(6):
        for row in range(rows.batch):
            which, index = rows.order[step * rows.batch + row]
            window, robot = sets[which].window(index), sets[which].robot
            found = rows.read(step, row)
            robots, chunks = training_rows([window], {robot.name: robot}, stage.statistics, POLICY)
            assert same(found.robots, robots) and same(found.chunks, chunks)
            instruction = window.observation.instruction
            assert same(found.seen, prompt_of(rows, robot, window.observation.state, window.observation.images, instruction))
            assert found.has_future.tolist() == [window.has_future]
            if window.has_future:
                assert same(found.future, prompt_of(rows, robot, window.observation.state, window.future, instruction))
            else:
                assert not any(np.any(array[array != -1]) for array in (found.future.mask, found.future.batch.segments))  # pyright: ignore
            assert [array.shape for array in arrays(found)] == [array.shape for array in arrays(rows.read(0, 0))]
            met.add((robot.name, window.has_future))
    assert len(met) == 4


def test_a_cached_row_is_its_window(stage: Stage, intents: list[Intents]) -> None:
    """But for pictures, of which the store has hidden states: the very ones of the frame and the version."""
    online, cached = stage.moments(augmentation=TWO), stage.moments(augmentation=TWO, intents=intents)
    versions = set()
    for sight in range(24):
        step, row = divmod(sight, cached.batch)
        found, wanted = cached.read(step, row), online.read(step, row)
        assert same(found.robots, wanted.robots) and same(found.chunks, wanted.chunks)
        assert found.has_future == wanted.has_future
        assert isinstance(found.seen, IntentRows) and isinstance(wanted.seen, Prompts)
        which, index = cached.order[sight]
        robot = cached.views[which].demonstrations.robot
        episode, at = cached.views[which].demonstrations.locate(index)
        version = TWO.version(sight)
        versions.add(version)
        frames = [length + (robot is SMALL and length >= robot.horizon) for length in LENGTHS[robot.name]]
        number = version * sum(frames) + sum(frames[:episode]) + at
        for shown, asked, frame in ((found.seen, wanted.seen, number), (found.future, wanted.future, number + robot.horizon)):
            assert isinstance(shown, IntentRows) and isinstance(asked, Prompts)
            assert shown.mask.sum() == asked.mask.sum()
            np.testing.assert_array_equal(shown.places[shown.mask], asked.places[asked.mask])
            if shown is found.seen or found.has_future[0]:
                np.testing.assert_array_equal(shown.hidden[shown.mask], hidden_of(frame, int(asked.mask.sum())))
            else:
                assert not shown.mask.any() and not shown.hidden.any()
    assert versions == {0, 1}


def test_what_changes_pictures(stage: Stage) -> None:
    """Two versions of each episode, its pictures all changed alike; without versions, a new one each time."""

    def seen(augmentation: Augmentation) -> dict[tuple[int, int], set[bytes]]:
        rows = stage.moments(augmentation=augmentation)
        found: dict[tuple[int, int], set[bytes]] = {}
        for sight in range(48):
            moment = rows.read(*divmod(sight, rows.batch))
            assert isinstance(moment.seen, Prompts) and moment.seen.batch.vision is not None
            found.setdefault(rows.order[sight], set()).add(moment.seen.batch.vision.patches.tobytes())
        return found

    few, many, none = seen(TWO), seen(Augmentation(CHANGES, seed=3)), seen(Augmentation())
    assert max(map(len, few.values())) == 2 and max(map(len, many.values())) > 2 and {len(one) for one in none.values()} == {1}
    assert few == seen(TWO) and few != seen(Augmentation(CHANGES, seed=4, versions=2))


def test_the_future_is_changed_as_what_is_seen(stage: Stage) -> None:
    """A still scene: what was changed in one way looks the same a chunk later, so nothing but motion is left to foresee."""
    one = stage.open("my_arm")
    still = {camera.name: np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8) for camera in ARM.cameras}
    now, later = (TWO.change(still, one.source, 0, 1) for _ in range(2))
    assert all(np.array_equal(now[name], later[name]) for name in still)
    assert not np.array_equal(now["front"], now["wrist"])
    assert not np.array_equal(now["front"], TWO.change(still, one.source, 1, 1)["front"])


@dataclass(frozen=True)
class Pair:
    online: Moments
    cached: Moments


@dataclass(frozen=True)
class Pairs:
    """Both kinds of rows by one loader: processes take seconds to start."""

    online: MomentRows
    cached: MomentRows

    def host_rows(self, host: int, hosts: int) -> range:
        return self.cached.host_rows(host, hosts)

    def read(self, step: int, row: int) -> Pair:
        return Pair(self.online.read(step, row), self.cached.read(step, row))


def read(rows: Pairs, first: int, steps: int, hosts: int = 1, workers: int = 0) -> list[list[np.ndarray]]:
    """The global batches of some steps, put together from what each host reads."""
    parts = []
    for host in range(hosts):
        loader = Loader(rows, start=first, host=host, hosts=hosts, workers=workers)
        parts.append([arrays(next(loader)) for _ in range(steps)])
        loader.close()
    return [[np.concatenate(part) for part in zip(*(host[step] for host in parts), strict=True)] for step in range(steps)]


def test_a_restart_elsewhere_reads_the_same(stage: Stage, tmp_path: Path) -> None:
    """Hidden states are bfloat16, as they are in training: they pass between processes too."""
    intents = [write_intents(tmp_path / name, stage, robot, TWO, "bfloat16") for name, robot in ROBOTS.items()]

    def opened() -> Pairs:
        return Pairs(stage.moments(augmentation=TWO), stage.moments(augmentation=TWO, intents=intents))

    whole = read(opened(), 0, 4)
    for stop, (hosts, workers) in enumerate([(2, 0), (4, 0), (1, 1)], start=1):
        rest = read(opened(), stop, 4 - stop, hosts, workers)
        for one, other in zip(whole[stop:], rest, strict=True):
            assert [array.dtype for array in one] == [array.dtype for array in other]
            assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_batch_of_robots_is_one(stage: Stage) -> None:
    loader = Loader(stage.moments(batch=8))
    batch = next(loader)
    loader.close()
    assert isinstance(batch, Moments) and isinstance(batch.seen, Prompts) and batch.seen.batch.vision is not None
    assert batch.seen.batch.vision.groups == 8 == len(batch.has_future)
    assert set(batch.robots.robot.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"statistics": {}}, r"small: of robot small there are no statistics, only of none: read its survey too"),
        ({"statistics": ["small"]}, r"my_arm: of robot my_arm there are no statistics, only of small: read its survey too"),
        ({"robots": ("small", "panda")}, "the policy has no robot my_arm; it has|the policy has no robot my_arm: add it to policy.robots"),
        ({"horizon": 3}, "robot my_arm has chunks of 4 steps, the policy of 3: lower its horizon or raise policy.horizon"),
        ({"embodiment": EmbodimentConfig(state_width=6, action_width=8)}, "robot my_arm has 7 state dimensions, the policy room for 6"),
    ],
)
def test_robots_that_the_policy_does_not_know(stage: Stage, changes: dict[str, Any], said: str) -> None:
    known = changes.pop("statistics", list(ROBOTS))
    statistics = {name: stage.statistics[name] for name in known}
    with pytest.raises(RequestError, match=said) as caught:
        open_moments(stage.sets(), statistics, replace(POLICY, **changes), stage.engine(), batch=4)
    assert "\n" not in str(caught.value)


def test_statistics_of_another_layout(stage: Stage) -> None:
    wrong = {"small": stage.statistics["small"], "my_arm": replace(stage.statistics["my_arm"], horizon=5)}
    with pytest.raises(RequestError, match="the statistics do not match robot my_arm: their horizon is 5, its horizon is 4"):
        open_moments(stage.sets(), wrong, POLICY, stage.engine(), batch=4)


def test_bytes_travel_and_engines_do_not(stage: Stage) -> None:
    rows = stage.moments()
    first = rows.read(0, 1)
    assert len(pickle.dumps(rows)) < 30_000  # the vocabulary alone is a megabyte
    assert same(pickle.loads(pickle.dumps(rows)).read(0, 1), first)


def test_what_cannot_be_read(stage: Stage, intents: list[Intents]) -> None:
    rows = stage.moments()
    for view in rows.views:
        view.prompter.shape = replace(view.prompter.shape, length=20)  # pyright: ignore
    with pytest.raises(RequestError, match=r"step \d: the prompt has \d+ tokens, and 20 is the length of all: make room for"):
        rows.read(0, 0)
    with pytest.raises(RequestError, match="there are 2 sets of demonstrations and 1 shares: give each set one, in the same order"):
        stage.moments(shares=[1])
    with pytest.raises(RequestError, match=r"mixture: .*small as small has a weight of None: it must be a number above 0"):
        stage.moments(shares=[None, 1])
    with pytest.raises(RequestError, match="a batch of 4 rows cannot be cut for host 0 of 3"):
        Loader(stage.moments(), hosts=3)
    with pytest.raises(RequestError, match="there are no intents of my_arm: make them with blm data features"):
        stage.moments(augmentation=TWO, intents=intents[:1])
    with pytest.raises(RequestError, match="there are 2 intents of small"):
        stage.moments(augmentation=TWO, intents=[intents[0]] * 2)
