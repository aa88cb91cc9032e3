"""A policy inside the compiled program acts as `sample_actions` does on the host, from the same pictures, states and words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.data.demos.observation import Observation
from blm_jax.errors import RequestError
from blm_jax.evaluate.world import view
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.runs import cells
from blm_jax.evaluate.world.runs.cells import PREFIX
from blm_jax.evaluate.world.runs.pilot import SMOOTH, TURNS, Memory, Pilot, faded, smoothed
from blm_jax.evaluate.world.scene import JOINTS
from blm_jax.infer.act import Actor, load_actor
from tests.evaluate.world.runs.driven import write_driver


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Actor:
    return load_actor(str(write_driver(tmp_path_factory.mktemp("driver") / "model")))


def test_as_on_the_host(actor: Actor) -> None:
    pilot = Pilot(actor, seed=5)
    episodes = cells.episodes_of(("panda", "xarm6"), ("PickCube", "PlaceSphere"), 1, first=7)
    settings, states = cells.begin(np.uint32(0), *episodes, kind=cells.EVALUATION, two=False)
    names = [ROBOTS[robot] for robot in episodes.robot]
    texts = cells.instructions(settings, episodes.number)
    rows = pilot.rows(names, texts, episodes.number)
    turn = 3
    told = decided(pilot, rows, settings, states, turn)
    pictures = np.asarray(view.pictures(jax.vmap(view.shapes)(settings, states)))
    assert told.shape == (4, 16, JOINTS + 1)
    for i, name in enumerate(names):
        robot = actor.files.robots[PREFIX + name]
        joints = len(robot.state) - 1
        state = np.append(states.joints[i, :joints], states.opening[i])
        seen = Observation(state, {camera: pictures[i, k] for k, camera in enumerate(view.CAMERAS)}, texts[i])
        number = int(episodes.number[i]) * TURNS + turn
        [[chunk]] = actor.sample_actions([seen], [robot.name], seed=5, first=number)
        around = np.concatenate([[state[:-1]] * 2, chunk[:, :-1], [chunk[-1, :-1]] * 2])
        mean = [np.convolve(joint, SMOOTH, mode="valid") for joint in around.T]
        np.testing.assert_allclose(told[i, :, :joints].T, mean, atol=2e-5)
        np.testing.assert_allclose(told[i, :, JOINTS], chunk[:, -1], atol=2e-5)
        np.testing.assert_allclose(told[i, :, joints:JOINTS], np.broadcast_to(states.joints[i, joints:], (16, JOINTS - joints)), atol=1e-6)


def decided(pilot: Pilot, rows: Any, settings: Any, states: Any, turn: int = 0) -> np.ndarray:
    """The first chunks [rows, horizon, JOINTS + 1]."""
    memory = jax.vmap(pilot.begin)(rows.number, settings, states)
    return np.asarray(jax.jit(pilot.decide)(pilot.values, jax.tree.map(jnp.asarray, rows), settings, states, memory, jnp.int32(turn)).chunk)


def test_an_arm_that_goes_on_is_not_smoothed_and_one_that_trembles_is() -> None:
    now = jnp.arange(JOINTS + 1.0)
    still = jnp.broadcast_to(now, (16, JOINTS + 1))
    np.testing.assert_allclose(smoothed(now, still), still, rtol=1e-6)
    trembling = still + 0.1 * (-1.0) ** jnp.arange(16)[:, None]
    made = smoothed(now, trembling)
    assert np.abs(np.diff(made[2:-2, :JOINTS], axis=0)).max() < 0.2 * np.abs(np.diff(trembling, axis=0)).max()
    np.testing.assert_array_equal(made[:, JOINTS], trembling[:, JOINTS])
    line = now + 0.1 * jnp.arange(1, 17)[:, None]
    np.testing.assert_allclose(smoothed(now, line)[2:-2], line[2:-2], rtol=1e-5)


def test_a_chunk_begins_as_the_last_one_would_have_gone_on() -> None:
    last, new = jnp.zeros((1, 16, JOINTS + 1)).at[:, 8:].set(1.0), jnp.full((1, 16, JOINTS + 1), 2.0)
    made = np.asarray(faded(last, new, 8))[0, :, 0]
    np.testing.assert_allclose(made, [*(1 + np.arange(1, 9) / 9), *[2.0] * 8], rtol=1e-6)


def test_the_first_chunk_of_an_episode_follows_nothing(actor: Actor) -> None:
    pilot = Pilot(actor)
    settings, states = cells.begin(np.uint32(0), *cells.episodes_of(("panda",), ("PickCube",), 1), kind=cells.EVALUATION, two=False)
    rows = jax.tree.map(jnp.asarray, pilot.rows(["panda"], ["pick up the red cube"], np.zeros(1, np.int32)))
    decide = jax.jit(pilot.decide)

    def told(begun: bool) -> np.ndarray:
        memory = Memory(jnp.full((1, 16, JOINTS + 1), 9.0), jnp.array([begun]))
        return np.asarray(decide(pilot.values, rows, settings, states, memory, jnp.int32(0)).chunk)

    np.testing.assert_array_equal(told(False), decided(pilot, rows, settings, states))
    np.testing.assert_allclose(told(True), faded(jnp.full((1, 16, JOINTS + 1), 9.0), jnp.asarray(told(False)), pilot.turn), rtol=1e-6)


def test_pictures_and_words_matter(actor: Actor) -> None:
    episodes = cells.episodes_of(("panda",), ("PickCube",), 2)
    settings, states = cells.begin(np.uint32(0), *episodes, kind=cells.EVALUATION, two=False)
    settings, states = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), (settings, states))

    def told(words: list[str], **options: Any) -> np.ndarray:
        pilot = Pilot(actor, **options)
        rows = pilot.rows(["panda", "panda"], words, np.zeros(2, np.int32))
        return decided(pilot, rows, settings, states)

    one, other = told(["pick up the red cube", "pick up the blue cube"])
    assert np.abs(one - other).max() > 1e-5
    black = told(["pick up the red cube", "pick up the blue cube"], blind=True)
    assert np.abs(one - black[0]).max() > 1e-5


def test_another_contract_is_refused(actor: Actor) -> None:
    robots = dict(actor.files.robots)
    panda = robots["world_panda"]
    robots["world_panda"] = replace(panda, cameras=panda.cameras[:1])
    changed = Actor(actor.backbone, actor.policy, replace(actor.files, robots=robots), actor.engine, None)
    with pytest.raises(RequestError, match="world_panda is not the world's: cameras differ"):
        Pilot(changed)
    with pytest.raises(RequestError, match="does not drive world_xarm7; of the world's robots it knows panda, xarm6"):
        Pilot(actor).robot("xarm7")
