"""What training must be able to do, in memory: learn a batch by heart, one robot's rows alone, nothing that is frozen."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from blm_jax import mesh as meshes
from blm_jax.batch import Moments
from blm_jax.config import ComputeConfig, HardwareConfig, MeshConfig
from blm_jax.models.objective import sample
from blm_jax.models.policy import policy_with_params
from blm_jax.recipe import OptimizerConfig, Run, SetConfig, StageTwoConfig
from blm_jax.train.outline import outline
from blm_jax.train.select import split
from blm_jax.train.step import begin
from blm_jax.weights.names import leaves
from tests.models.policies import make_inputs, small
from tests.train.runs import conversations, losses, make_mesh, place, random_tree, start

FAST = OptimizerConfig(rate=4e-3, warmup=0.05, weight_decay=0.0, betas=(0.9, 0.95))


def test_stage_one_learns_a_batch_by_heart() -> None:
    run = start(1, make_mesh(1, 1, 1), config=FAST, steps=45, batches=lambda number: conversations(0))
    told = [losses(report.told)["loss"] for report in run.go(45)]
    assert told[-1] < 0.01 < 1 < told[0]


def test_stage_two_learns_a_batch_by_heart() -> None:
    """All that noise leaves open is in the observation: a squared error of 1 and more becomes a few hundredths."""
    policy = small(objective={"draws": 8})
    made = make_inputs(policy, 4, 11, seed=1)
    batch = Moments(made.robots, made.chunks, made.has_future, made.intent, made.future, np.zeros(4, np.int32))
    run = start(2, make_mesh(1, 1, 1), config=FAST, steps=600, policy=policy, batches=lambda number: batch)
    told = [losses(report.told) for report in run.go(600)]
    assert np.mean([row["action"] for row in told[-20:]]) < 0.05 * told[0]["action"]
    assert told[-1]["future"] < 1e-3


def test_a_robot_alone_leaves_others_as_they_are() -> None:
    """Its own rows move; every other robot's actions are the same, bit for bit."""
    policy = small()
    mine = policy.robots[2]
    config = OptimizerConfig(rate=1e-2, warmup=0.0, weight_decay=0.1)
    two = StageTwoConfig((SetConfig("set", mine, "stats"),), only=mine)
    run = Run(steps=5, batch=4, optimizer=config, stage_two=two, hardware=HardwareConfig(mesh=MeshConfig(1, 1, 1)))
    mesh = make_mesh(1, 1, 1)
    found = outline(run, mesh, None, policy)
    shapes = {"policy": {**found.frozen["policy"], "embodiments": found.trained["policy"]["embodiments"]}}
    params = place(random_tree(shapes), shapes)
    trained, frozen = split(params, found.rate_of)
    assert [path for path, _ in leaves(trained) if path[1] != "embodiments"] == []
    state, step = begin(trained, params["policy"]["bridge"], found.optimizer, mesh), found.step()
    made = make_inputs(policy, 4, 11, seed=1)
    robots = meshes.put(made.robots, None)
    own = np.full(4, 2, np.int32)
    learned = Moments(
        jax.tree.map(lambda leaf: leaf[own], made.robots), made.chunks, made.has_future, made.intent, made.future, np.zeros(4, np.int32)
    )

    def actions(embodiments: Any) -> np.ndarray:
        tree = {**params["policy"], "embodiments": embodiments}
        model = policy_with_params(policy, ComputeConfig(), tree)
        noise = jax.random.normal(jax.random.key(0), made.chunks.actions.shape)
        act = jax.jit(lambda model, noise: sample(model, model.condition(meshes.put(made.intent, None), robots), noise, 2))
        return np.asarray(act(model, noise))

    before = actions(jax.tree.map(lambda leaf: leaf.copy(), trained["policy"]["embodiments"]))
    with meshes.use(mesh):
        for _ in range(5):
            state, report = step(state, frozen, meshes.put(learned, mesh))
    assert int(report.skipped) == 0
    after = actions(state.params["policy"]["embodiments"])
    others = np.asarray(made.robots.robot) != 2
    assert np.array_equal(after[others], before[others]) and not np.allclose(after[~others], before[~others])


def test_it_compiles_once() -> None:
    run = start(2, make_mesh(1, 1, 1))
    run.go(2)
    compiled: list[str] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)  # pyright: ignore[reportArgumentType]
    try:
        run.go(6, start=2)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled
