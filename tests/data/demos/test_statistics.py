"""Statistics and the way between a robot's numbers and the model's, against NumPy and by inversion."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm_jax.data.demos.robots import Camera, Dimension, Robot, load_robots
from blm_jax.data.demos.statistics import (
    Scheme,
    Statistics,
    affine,
    check_statistics,
    decode_actions,
    encode_actions,
    encode_state,
    from_arrays,
    from_json,
    normalise,
    to_absolute,
    to_json,
    to_relative,
    unnormalise,
)
from blm_jax.errors import RequestError

SCHEMES = get_args(Scheme)
LIFT, TURN = Dimension("lift", "m", 0, 0.5), Dimension("turn", "rad", -3, 3)
GRIP = Dimension("gripper", "opening", 0, 1, "gripper")
# The action's order is not the state's: relative joints are found by name.
ARM = Robot("arm", (LIFT, TURN, GRIP), (GRIP, TURN, LIFT), (Camera("base", 8, 8),), horizon=4, executed=2)

seeds = st.integers(0, 2**32 - 1)


def demonstrations(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """States [n, 3] and absolute chunks [n, 4, 3] within the limits."""
    rng = np.random.default_rng(seed)
    states = rng.uniform([0, -3, 0], [0.5, 3, 1], (count, 3))
    actions = states[:, None, [2, 1, 0]] + rng.normal(0, 0.05, (count, 4, 3))
    return states, np.clip(actions, [0, -3, 0], [1, 3, 0.5])


def message(call: Any, *args: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_numbers_are_numpys_over_the_steps_that_count() -> None:
    states, actions = demonstrations(0)
    mask = np.random.default_rng(1).random((200, 4)) < 0.7
    found = from_arrays(ARM, states, np.where(mask[..., None], actions, np.nan), mask)
    relative = actions - np.stack([np.zeros(200), states[:, 1], states[:, 0]], axis=1)[:, None]
    for summary, values in ((found.state, states), (found.action, relative[mask])):
        assert summary.count == (len(values),) * 3
        np.testing.assert_allclose(summary.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(summary.std, values.std(axis=0), rtol=1e-12)
        np.testing.assert_array_equal([summary.min, summary.max], [values.min(axis=0), values.max(axis=0)])
        np.testing.assert_array_equal([summary.q01, summary.q99], np.quantile(values, [0.01, 0.99], axis=0))
    assert found.action.names == ("gripper", "turn", "lift")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_each_scheme_makes_of_the_numbers(scheme: Scheme) -> None:
    states, actions = demonstrations(2)
    states[0, 1] = 30.0  # far outside: it is not clipped
    summary = from_arrays(ARM, states, actions, scheme=scheme).state
    found = normalise(states, summary, scheme)
    assert found.dtype == np.float32
    if scheme == "quantile":
        np.testing.assert_allclose(np.quantile(found, [0.01, 0.99], axis=0), [[-1] * 3, [1] * 3], atol=1e-6)
        assert found[0, 1] > 5
    elif scheme == "min_max":
        np.testing.assert_allclose([found.min(axis=0), found.max(axis=0)], [[-1] * 3, [1] * 3], atol=1e-6)
    else:
        np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(found.std(axis=0), 1, rtol=1e-6)


@given(seeds, st.sampled_from(SCHEMES), st.floats(-3, 3), st.floats(-4, 4))
def test_unnormalise_is_the_inverse(seed: int, scheme: Scheme, shift: float, size: float) -> None:
    rng = np.random.default_rng(seed)
    states, actions = demonstrations(seed, 50)
    summary = from_arrays(ARM, states * 10**size + 10**shift, actions, scheme=scheme).state
    _, scale = affine(summary, scheme)
    values = rng.normal(0, 3, (5, 3))
    back = normalise(unnormalise(values, summary, scheme), summary, scheme)
    spread = scale > 0
    np.testing.assert_allclose(back[:, spread], values[:, spread], rtol=1e-6, atol=1e-6)
    assert not back[:, ~spread].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("constant", [0.0, 0.1, -2.7])
def test_a_dimension_without_spread_is_zero_and_its_constant(scheme: Scheme, constant: float) -> None:
    states, actions = demonstrations(3)
    states[:, 1] = constant
    summary = from_arrays(ARM, states, actions, scheme=scheme).state
    assert not normalise(states, summary, scheme)[:, 1].any()
    assert (unnormalise(np.random.default_rng(0).normal(0, 9, (7, 3)), summary, scheme)[:, 1] == constant).all()
    # The rounding of float32 around a constant is no spread.
    states[:, 1] += np.where(np.arange(200) % 2, 1e-7, -1e-7)
    summary = from_arrays(ARM, states, actions, scheme=scheme).state
    assert not normalise(states, summary, scheme)[:, 1].any()


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_a_gripper_that_rarely_opens_is_neither_lost_nor_blown_up(noise: float) -> None:
    states, actions = demonstrations(4, 500)
    actions[..., 0] = np.random.default_rng(0).uniform(0, noise, (500, 4))
    actions[7, :, 0] = 1
    found = from_arrays(ARM, states, actions)
    assert found.action.q99[0] <= noise
    encoded = encode_actions(actions, states, found, ARM)[..., 0]
    np.testing.assert_allclose(encoded[7], 1, atol=1e-6)
    np.testing.assert_allclose(np.delete(encoded, 7, axis=0), -1, atol=3 * noise)


@given(seeds)
def test_relative_actions_are_relative_to_the_state_of_the_same_name(seed: int) -> None:
    states, actions = demonstrations(seed, 5)
    relative = to_relative(actions, states, ARM)
    for i in range(5):
        for step in range(4):
            grip, turn, lift = actions[i, step]
            np.testing.assert_array_equal(relative[i, step], [grip, turn - states[i, 1], lift - states[i, 0]])
    np.testing.assert_allclose(to_absolute(relative, states, ARM), actions, rtol=0, atol=1e-15)
    absolute = replace(ARM, relative=False)
    np.testing.assert_array_equal(to_relative(actions, states, absolute), actions)


@given(seeds, st.sampled_from(SCHEMES), st.booleans(), st.sampled_from([(), (2,), (2, 3)]))
def test_actions_go_to_the_model_and_back(seed: int, scheme: Scheme, relative: bool, lead: tuple[int, ...]) -> None:
    robot = replace(ARM, relative=relative)
    states, actions = demonstrations(seed, 50)
    found = from_arrays(robot, states, actions, scheme=scheme)
    state = states[0]
    chunks = np.broadcast_to(actions[0], (*lead, 4, 3))
    state_rows = np.broadcast_to(state, (*lead, 3))
    encoded = encode_actions(chunks, state_rows, found, robot)
    assert encoded.dtype == np.float32
    back = decode_actions(encoded, state_rows, found, robot)
    np.testing.assert_allclose(back, chunks, atol=2e-6)
    assert encode_state(states, found).shape == states.shape


def test_what_the_model_says_is_clipped_to_the_limits() -> None:
    states, actions = demonstrations(5)
    found = from_arrays(ARM, states, actions)
    wild = np.random.default_rng(0).normal(0, 100, (200, 4, 3)).astype(np.float32)
    decoded = decode_actions(wild, states, found, ARM).astype(np.float64)
    for i, dimension in enumerate(ARM.action):
        assert decoded[..., i].min() >= dimension.low and decoded[..., i].max() <= dimension.high


@given(seeds, st.sampled_from(SCHEMES))
def test_json_brings_back_equal_statistics(seed: int, scheme: Scheme) -> None:
    found = from_arrays(ARM, *demonstrations(seed, 20), scheme=scheme)
    back = from_json(json.loads(json.dumps(to_json(found))), "statistics.json")
    assert back == found and back.fingerprint == found.fingerprint


def test_whole_numbers_keep_the_fingerprint() -> None:
    found = from_arrays(ARM, *demonstrations(0, 20))
    whole = replace(found, state=replace(found.state, mean=(0, 1, 2)))
    same = replace(found, state=replace(found.state, mean=(0.0, 1.0, 2.0)))
    assert whole.fingerprint == same.fingerprint
    assert from_json(json.loads(json.dumps(to_json(whole))), "statistics.json") == whole


def edited(found: Statistics, *path: Any, value: Any) -> Any:
    content = json.loads(json.dumps(to_json(found)))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


def test_statistics_that_were_edited_are_refused() -> None:
    found = from_arrays(ARM, *demonstrations(0, 20))
    source = "statistics.json"
    assert "of arm do not have the fingerprint" in message(from_json, edited(found, "state", "q01", 0, value=0.5), source)
    assert "of arm do not have the fingerprint" in message(from_json, edited(found, "scheme", value="min_max"), source)
    assert "do not have the fingerprint" in message(from_json, edited(found, "fingerprint", value=None), source)
    assert message(from_json, edited(found, "action", "q1", value=[0.0]), source).startswith("statistics.json: action.q1: no such key")
    assert "state: mean has 2 values for 3 dimensions" in message(from_json, edited(found, "state", "mean", value=[0.0, 1.0]), source)
    assert "state.mean.0: expected a number" in message(from_json, edited(found, "state", "mean", 0, value=float("nan")), source)
    assert "'mean' is not one of" in message(from_json, edited(found, "scheme", value="mean"), source)
    assert "are keys and values, not list" in message(from_json, [], source)


def test_each_number_has_its_place_in_the_fingerprint() -> None:
    found = from_arrays(ARM, *demonstrations(0, 20))
    variants = [
        found,
        *(replace(found, scheme=scheme) for scheme in SCHEMES[1:]),
        replace(found, relative=False),
        replace(found, robot="x"),
    ]
    for part in ("state", "action"):
        summary = getattr(found, part)
        for name in ("count", "mean", "std", "min", "max", "q01", "q99"):
            values = getattr(summary, name)
            variants.append(replace(found, **{part: replace(summary, **{name: (values[0] + 1, *values[1:])})}))
    assert len({variant.fingerprint for variant in variants}) == len(variants) == 19


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "leg"}, "robot leg: their name is arm, its name is leg"),
        ({"relative": False}, "their relative is True, its relative is False"),
        ({"horizon": 6}, "their horizon is 4, its horizon is 6"),
        ({"state": (LIFT, TURN)}, "their state has 3 dimensions, its state has 2"),
        ({"action": (GRIP, LIFT, TURN)}, "dimension 1 of their action is turn, of its action lift"),
    ],
)
def test_statistics_of_another_layout_are_refused(change: dict[str, Any], says: str) -> None:
    found = from_arrays(ARM, *demonstrations(0, 20))
    check_statistics(found, ARM)
    assert says in message(check_statistics, found, replace(ARM, **change))


def test_arrays_that_have_no_statistics() -> None:
    states, actions = demonstrations(0, 20)
    assert "states [n, 8] and actions [n, 16, 8], not [20, 3]" in message(from_arrays, load_robots()["panda"], states, actions)
    assert "not [19, 3] and [20, 4, 3]" in message(from_arrays, ARM, states[1:], actions)
    assert "no values" in message(from_arrays, ARM, states[:0], actions[:0])
    assert "no values" in message(from_arrays, ARM, states, actions, np.zeros((20, 4), bool))
    states[3, 1] = np.inf
    assert message(from_arrays, replace(ARM, relative=False), states, actions).startswith("turn: values that are not finite")
