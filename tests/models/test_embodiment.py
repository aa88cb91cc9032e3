"""A robot's own rows: trained alone, and added; whatever is done to them, the others act as before, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blm_jax.batch import RobotRows
from blm_jax.config import ComputeConfig, MeshConfig, PolicyConfig
from blm_jax.mesh import make_mesh
from blm_jax.models.embodiment import add_robot, robot_rows
from blm_jax.models.objective import losses, sample
from blm_jax.models.policy import abstract_policy, policy_with_params
from tests.convert.policy_dirs import make_params
from tests.models.policies import SMALL, make_inputs, make_noise

INPUTS = make_inputs(SMALL)  # row i has robot i
NOISE = make_noise(SMALL, 4)
Params = dict[str, Any]


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.tree.map(jnp.asarray, make_params(SMALL))


def acted(config: PolicyConfig, params: Params, robots: RobotRows = INPUTS.robots) -> np.ndarray:
    def act(params: Params) -> jax.Array:
        policy = policy_with_params(config, ComputeConfig(), params)
        return sample(policy, policy.condition(INPUTS.intent, robots), NOISE, 2)

    return np.asarray(jax.jit(act)(params))


def test_one_robots_rows_are_trained_alone(params: Params) -> None:
    """On a batch of all robots, with an optimizer that decays weights: its rows move, and nothing else by a bit."""

    def loss(params: Params) -> jax.Array:
        policy = policy_with_params(SMALL, ComputeConfig(), params)
        keys = jax.random.split(jax.random.key(0), INPUTS.rows)
        bridge = policy_with_params(SMALL, ComputeConfig(), jax.lax.stop_gradient(params)).bridge
        found = losses(policy, bridge, INPUTS.intent, INPUTS.robots, INPUTS.chunks, INPUTS.future, INPUTS.has_future, keys)
        return found.total(SMALL.objective)

    own = robot_rows(params, 2)
    alone = optax.stateless(lambda updates, _: jax.tree.map(lambda mask, update: jnp.where(mask, update, 0), own, updates))
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), alone)

    @jax.jit
    def step(params: Params) -> tuple[Params, Params]:
        slopes = jax.grad(loss)(params)
        updates, _ = optimizer.update(slopes, optimizer.init(params), params)
        return slopes, optax.apply_updates(params, updates)  # pyright: ignore[reportReturnType]

    slopes, stepped = step(params)
    assert all(np.any(slope) for slope in jax.tree.leaves(slopes))  # all else would have moved
    for (path, mask), before, after in zip(
        jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(params), jax.tree.leaves(stepped), strict=True
    ):
        mask = np.broadcast_to(mask, before.shape)
        assert np.asarray(before)[~mask].tobytes() == np.asarray(after)[~mask].tobytes(), path
        assert mask.any() == (path[0].key == "embodiments")
        if mask.any():
            np.testing.assert_array_equal(mask.reshape(4, -1).all(axis=1), [False, False, True, False])
            assert np.any(np.asarray(before)[mask] != np.asarray(after)[mask]), path
    old, new = acted(SMALL, params), acted(SMALL, stepped)
    np.testing.assert_array_equal(old[[0, 1, 3]], new[[0, 1, 3]])
    assert np.abs(old[2] - new[2]).max() > 1e-3
    with pytest.raises(ValueError, match="there is no row 4: the policy has 4 robots"):
        robot_rows(params, 4)


def test_a_robot_is_added(params: Params) -> None:
    """Its rows are as before any training, all others as they were, and so is what they do."""
    grown = add_robot(params, SMALL, seed=3)
    larger = replace(SMALL, robots=(*SMALL.robots, "my_arm"))
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, abstract_policy(larger))
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grown), strict=True):
        assert np.asarray(before).tobytes() == np.asarray(after[:4] if path[0].key == "embodiments" else after).tobytes(), path
    for name, part in grown["embodiments"].items():
        kernel = part["kernel"][4]
        if name == "action_timed":  # time is silent at first
            kernel, waves = np.split(kernel, 2)
            assert not waves.any()
        spread = np.std(kernel) * part["kernel"].shape[1] ** 0.5  # what goes in and what comes out are as large, but for first actions
        assert not part["bias"][4].any() and 0.8 < spread / (0.1 if name == "decode_outer" else 1) < 1.25, name
    np.testing.assert_array_equal(acted(SMALL, params), acted(larger, grown))
    other = replace(INPUTS.robots, robot=np.array([0, 4, 2, 3], np.int32))
    assert np.abs(acted(larger, grown, other) - acted(SMALL, params))[1].max() > 1e-3
    again = add_robot(grown, larger, seed=3)
    assert np.any(again["embodiments"]["state_inner"]["kernel"][5] != grown["embodiments"]["state_inner"]["kernel"][4])


def test_a_robot_is_added_on_a_mesh(params: Params) -> None:
    """Divided as a policy made with it would be."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    divided = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract_policy(SMALL, mesh=mesh)))
    grown = add_robot(divided, SMALL, seed=3)
    larger = replace(SMALL, robots=(*SMALL.robots, "my_arm"))
    jax.tree.map(
        lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim) or pytest.fail(str(leaf.sharding)),
        grown,
        abstract_policy(larger, mesh=mesh),
    )
    jax.tree.map(np.testing.assert_array_equal, grown, add_robot(params, SMALL, seed=3))
