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
from blm_jax.evaluate.world.runs.pilot import TURNS, Pilot
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
    told = jax.jit(pilot.decide)(pilot.values, jax.tree.map(jnp.asarray, rows), settings, states, jnp.zeros(0), jnp.int32(turn))
    pictures = np.asarray(view.pictures(jax.vmap(view.shapes)(settings, states)))
    assert told.shape == (4, 8, JOINTS + 1)
    for i, name in enumerate(names):
        robot = actor.files.robots[PREFIX + name]
        joints = len(robot.state) - 1
        state = np.append(states.joints[i, :joints], states.opening[i])
        seen = Observation(state, {camera: pictures[i, k] for k, camera in enumerate(view.CAMERAS)}, texts[i])
        number = int(episodes.number[i]) * TURNS + turn
        [[chunk]] = actor.sample_actions([seen], [robot.name], seed=5, first=number)
        np.testing.assert_allclose(told[i, :, :joints], chunk[:8, :-1], atol=2e-5)
        np.testing.assert_allclose(told[i, :, JOINTS], chunk[:8, -1], atol=2e-5)
        np.testing.assert_array_equal(told[i, :, joints:JOINTS], np.broadcast_to(states.joints[i, joints:], (8, JOINTS - joints)))


def test_pictures_and_words_matter(actor: Actor) -> None:
    episodes = cells.episodes_of(("panda",), ("PickCube",), 2)
    settings, states = cells.begin(np.uint32(0), *episodes, kind=cells.EVALUATION, two=False)
    settings, states = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), (settings, states))

    def told(words: list[str], **options: Any) -> np.ndarray:
        pilot = Pilot(actor, **options)
        rows = pilot.rows(["panda", "panda"], words, np.zeros(2, np.int32))
        return np.asarray(pilot.decide(pilot.values, jax.tree.map(jnp.asarray, rows), settings, states, jnp.zeros(0), jnp.int32(0)))

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
