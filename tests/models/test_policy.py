"""The policy: what must not change a result, what a loss counts, what a compiled program holds, and meshes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blm_jax import mesh as meshes
from blm_jax.batch import Chunks, IntentRows, RobotRows
from blm_jax.config import BridgeConfig, ComputeConfig, MeshConfig, ObjectiveConfig, Path, PolicyConfig
from blm_jax.errors import RequestError
from blm_jax.mesh import make_mesh
from blm_jax.models.bridge import Bridge
from blm_jax.models.dit import Clock
from blm_jax.models.layers import around, shapes_of
from blm_jax.models.mllm import random_params, with_params
from blm_jax.models.objective import OPEN, PATHS, Committed, losses, sample
from blm_jax.models.policy import Policy, Velocity, abstract_policy
from tests.models.oracle import CASES
from tests.models.policies import LAYOUTS, SMALL, Inputs, make_inputs, make_noise, make_policy, small
from tests.models.test_programs import equations, make_batch

# With all that training adds, each drawn from a key a row.
TRAINED = small(objective=dict(prefix=3, draws=2), dit=dict(dropout=0.3), embodiment=dict(state_dropout=0.25))
POOL = make_inputs(TRAINED, rows=8, seed=1)
KEYS = jax.random.split(jax.random.key(6), 8)  # that hide the states of the first row and of the last
NOISE = make_noise(TRAINED, 8)
CLOSE: dict[str, Any] = dict(atol=3e-5, rtol=1e-4)  # float32, summed in another order


def everything(policy: Policy, inputs: Inputs, keys: jax.Array, noise: jax.Array) -> dict[str, Any]:
    """By row: velocities, what is foreseen, sampled actions, losses."""
    condition = policy.condition(inputs.intent, inputs.robots)
    velocity = policy.velocity(condition, noise, jnp.full(len(noise), 0.3))
    target = make_target(policy)
    found = losses(policy, target, inputs.intent, inputs.robots, inputs.chunks, inputs.future, inputs.has_future, keys)
    return dict(velocity=velocity, actions=sample(policy, condition, noise, 2), losses=found)


def make_target(policy: Policy) -> Bridge:
    return jax.tree.map(lambda leaf: 0.9 * leaf, policy.bridge)


def loss_of(policy: Policy, target: Bridge, inputs: Inputs, keys: jax.Array) -> jax.Array:
    found = losses(policy, target, inputs.intent, inputs.robots, inputs.chunks, inputs.future, inputs.has_future, keys)
    return found.total(policy.config.objective)


compute_everything = jax.jit(everything)
loss_and_slopes = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))


def assert_close(one: Any, other: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(TRAINED)


@pytest.fixture(scope="module")
def clean_rows(policy: Policy) -> Any:
    """Of each row of the clean pool."""
    halves = [compute_everything(policy, CLEAN.take(half), KEYS[half], CLEAN_NOISE[half]) for half in (slice(0, 4), slice(4, 8))]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *halves)


def spoil(inputs: Inputs, value: float, rng: np.random.Generator) -> Inputs:
    """`value` in all dimensions that are absent, junk of its size in padding of intents, and places that are none."""

    def tokens(intent: IntentRows) -> IntentRows:
        junk = np.float32(value) * rng.standard_normal(intent.hidden.shape, np.float32)
        places = rng.integers(0, 4, intent.places.shape, np.int32)
        real = intent.mask[..., None]
        return IntentRows(np.where(real, intent.hidden, junk), intent.mask, np.where(real, intent.places, places))

    robots, chunks = inputs.robots, inputs.chunks
    return replace(
        inputs,
        intent=tokens(inputs.intent),
        robots=replace(robots, state=np.where(robots.state_mask, robots.state, np.float32(value))),
        chunks=Chunks(np.where(chunks.mask, chunks.actions, np.float32(value)), chunks.mask),
        future=tokens(inputs.future),
    )


CLEAN = spoil(POOL, 0.0, np.random.default_rng(0))  # with zeros where there is nothing
CLEAN_NOISE = np.where(POOL.robots.action_mask, NOISE, 0)


def lengthen(intent: IntentRows, tokens: int) -> IntentRows:
    spare = tokens - intent.mask.shape[1]
    return jax.tree.map(lambda leaf: np.pad(leaf, ((0, 0), (0, spare)) + ((0, 0),) * (leaf.ndim - 2)), intent)


@settings(max_examples=25)
@given(
    rows=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    tokens=st.sampled_from([11, 16]),
    value=st.sampled_from([0.0, 1.0, -1e4, np.nan]),
    seed=st.integers(0, 2**16),
)
def test_a_row_depends_on_nothing_but_itself(
    policy: Policy, clean_rows: Any, rows: list[int], tokens: int, value: float, seed: int
) -> None:
    """Not on its place, on other rows, on padding, on dimensions and steps its robot lacks, on actions past the episode's end."""
    batch = POOL.take(np.asarray(rows))
    batch = replace(batch, intent=lengthen(batch.intent, tokens), future=lengthen(batch.future, tokens))
    noise = np.where(batch.robots.action_mask, NOISE[rows], np.float32(value))
    found = compute_everything(policy, spoil(batch, value, np.random.default_rng(seed)), KEYS[np.asarray(rows)], noise)
    assert_close(found, jax.tree.map(lambda leaf: leaf[rows], clean_rows))


def test_padding_changes_no_gradient(policy: Policy) -> None:
    batch, target = POOL.take(slice(0, 4)), make_target(policy)
    plain = loss_and_slopes(policy, target, spoil(batch, 0.0, np.random.default_rng(0)), KEYS[:4])
    junk = loss_and_slopes(policy, target, spoil(batch, np.nan, np.random.default_rng(1)), KEYS[:4])
    assert_close(junk, plain)


@pytest.mark.parametrize("absent", [1, 2])
def test_an_absent_camera_is_absent_tokens(policy: Policy, absent: int) -> None:
    """Masked or left out is the same; the other camera keeps its number."""
    camera = np.array([1] * 4 + [2] * 4 + [0] * 3)
    places = np.where(camera[:, None] > 0, np.stack([camera, np.arange(11) % 2, np.arange(11) // 2 % 2, 0 * camera], axis=1), 0)
    full = replace(POOL.intent, places=np.tile(places.astype(np.int32), (8, 1, 1)), mask=np.tile(camera != absent, (8, 1)))
    short = jax.tree.map(lambda leaf: leaf[:, camera != absent], full)
    bridge = jax.jit(Bridge.__call__)
    np.testing.assert_allclose(bridge(policy.bridge, full), bridge(policy.bridge, short), **CLOSE)
    both = replace(full, mask=np.ones_like(full.mask))
    assert np.abs(bridge(policy.bridge, full) - bridge(policy.bridge, both)).max() > 0.01


def test_steps_that_a_robot_lacks_are_as_if_they_were_not(policy: Policy) -> None:
    """A policy cut to the horizon of its shortest robot says the same for it."""
    steps = LAYOUTS[1][2]
    row = POOL.take(np.asarray([1]))
    cut = around(lambda: Policy(replace(TRAINED, horizon=steps), ComputeConfig(), rngs=nnx.Rngs(0)), cut_horizon(policy, steps))
    robots = replace(row.robots, action_mask=row.robots.action_mask[:, :steps])
    run = jax.jit(lambda policy, robots, noise: sample(policy, policy.condition(row.intent, robots), noise, 2))
    found = run(policy, row.robots, NOISE[1:2])
    np.testing.assert_allclose(found[:, :steps], run(cut, robots, NOISE[1:2, :steps]), **CLOSE)
    assert not np.any(found[:, steps:])


def cut_horizon(policy: Policy, steps: int) -> dict[str, Any]:
    params = nnx.to_pure_dict(nnx.state(policy, nnx.Param))
    return {**params, "action_places": params["action_places"][:steps]}


def test_steps_of_a_token_are_one_wide_step() -> None:
    """A policy whose tokens hold two steps says what one with half as many steps, twice as wide, says with the same weights."""
    patched = replace(SMALL, horizon=8, embodiment=replace(SMALL.embodiment, patch=2))
    widths = replace(SMALL.embodiment, action_width=2 * SMALL.embodiment.action_width)
    wide = replace(SMALL, horizon=4, embodiment=widths)
    policy = make_policy(patched)
    params = nnx.to_pure_dict(nnx.state(policy, nnx.Param))
    other = around(lambda: Policy(wide, ComputeConfig(), rngs=nnx.Rngs(0)), params)
    batch = make_inputs(patched, rows=8, seed=1)  # some robots lack half of a token's steps, or a token

    def halved(values: np.ndarray) -> np.ndarray:
        return np.asarray(values).reshape(len(values), wide.horizon, -1)

    robots = replace(batch.robots, action_mask=halved(batch.robots.action_mask))
    noise = make_noise(patched, 8)

    def say(policy: Policy, robots: RobotRows, noise: Any) -> tuple[Velocity, jax.Array]:
        condition = policy.condition(batch.intent, robots)
        return policy.velocity(condition, noise, jnp.full(len(noise), 0.3)), sample(policy, condition, noise, 2)

    (velocity, actions), (wanted, others) = jax.jit(say)(policy, batch.robots, noise), jax.jit(say)(other, robots, halved(noise))
    np.testing.assert_allclose(halved(velocity.actions), wanted.actions, **CLOSE)
    np.testing.assert_allclose(velocity.future, wanted.future, **CLOSE)
    np.testing.assert_allclose(halved(actions), others, **CLOSE)
    assert actions.shape == (8, 8, SMALL.embodiment.action_width) and np.abs(actions).max() > 0.5


@pytest.mark.parametrize(
    ("horizon", "patch", "prefix", "message"),
    [
        (7, 2, 0, "embodiment.patch is 2: so many steps are one token, and it must divide the horizon of 7"),
        (8, 0, 0, "embodiment.patch is 0"),
        (8, 2, 3, "embodiment.patch is 2 and objective.prefix 3: given steps have a time of their own"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(horizon: int, patch: int, prefix: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace(
            SMALL,
            horizon=horizon,
            embodiment=replace(SMALL.embodiment, patch=patch),
            objective=replace(SMALL.objective, prefix=prefix),
        )


@pytest.mark.parametrize("norms", [True, False])
def test_tokens_are_normalised_or_not(norms: bool) -> None:
    """With no layer's sum to add, a DiT's tokens come out as large as they went in, or all of one size. Parameters are the same."""
    config = small(dit=dict(norms=norms))
    assert jax.tree.map(jnp.shape, abstract_policy(config)) == jax.tree.map(jnp.shape, abstract_policy(SMALL))
    dit, width = make_policy(config).dit, config.dit.width
    silent = jax.tree.map(jnp.zeros_like, dit)  # no layer and no time says anything
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, width)), jnp.float32) + 1
    memory = dit.remember(jnp.ones((2, 3, config.bridge.width)))
    clock = Clock(jnp.zeros((1, 1, width)), jnp.zeros((1, 5), jnp.int32))
    run = jax.jit(lambda dit, x: dit(x, memory, jnp.ones((2, 5), jnp.int32), clock)[0])
    once, thrice = run(silent, x), run(silent, 3 * x)
    np.testing.assert_allclose(thrice, once if norms else 3 * once, atol=1e-4)
    np.testing.assert_allclose(once.std(axis=-1) if norms else once, 1 if norms else x, atol=1e-4)
    # Nor within the layers: what they add to large tokens grows with them.
    added = [np.abs(run(dit, size * x) - (0 if norms else size * x)).max() for size in (1, 100)]
    assert (added[1] < 3 * added[0]) == norms


# Losses


@pytest.mark.parametrize(("path", "prefix"), [("flow", 3), ("clean", 3), ("ddim", 0)])
def test_the_loss_is_a_loop_over_samples(monkeypatch: pytest.MonkeyPatch, path: Path, prefix: int) -> None:
    """What the network was asked and what it said is recorded; each number it should have said is worked out one by one."""
    config = small(objective=dict(path=path, prefix=prefix, draws=3))
    policy, inputs, keys = make_policy(config), POOL.take(slice(0, 4)), KEYS[:4]
    asked: list[Any] = []
    velocity = Policy.velocity

    def recording(self: Policy, condition: Any, noised: jax.Array, time: jax.Array, given: Any = None, keys: Any = None) -> Any:
        said = velocity(self, condition, noised, time, given, keys)
        asked.append((noised, time, jnp.zeros(noised.shape[:2], bool) if given is None else given, said))
        return said

    monkeypatch.setattr(Policy, "velocity", recording)

    def run(policy: Policy, inputs: Inputs, keys: jax.Array) -> Any:
        target = make_target(policy)
        return losses_of(policy, target, inputs, keys), asked.pop(), target(inputs.future)

    found, (noised, time, given, said), wanted = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(run)(policy, inputs, keys))
    assert len(np.unique(time)) == len(time) == 12 and time.min() >= 0 and time.max() < 1
    steps_given = given.sum(axis=1)
    assert steps_given.max() <= prefix and (prefix == 0 or len(np.unique(steps_given)) > 1)

    action, future = [], []
    for row in range(4):
        squares, agreements = [], []
        for n in range(3 * row, 3 * row + 3):
            alpha, sigma = (np.sin(np.pi / 2 * time[n]), np.cos(np.pi / 2 * time[n])) if path == "ddim" else (time[n], 1 - time[n])
            for step, dimension in np.argwhere(inputs.chunks.mask[row]):
                true, seen = float(inputs.chunks.actions[row, step, dimension]), noised[n, step, dimension]
                if given[n, step]:
                    assert seen == pytest.approx(true)
                    continue
                noise = (seen - alpha * true) / sigma
                heard, answer = said.actions[n, step, dimension], alpha * noise - sigma * true if path == "ddim" else true - noise
                if path == "clean":  # the error of the foretold actions, of which the network sees what x says of them
                    kept = alpha * OPEN**2 / (alpha**2 * OPEN**2 + sigma**2)
                    heard, answer = seen + (1 - kept * alpha) * heard, true
                squares.append((heard - answer) ** 2)
            for query in range(config.bridge.queries):
                one, other = said.future[n, query], wanted[row, query]
                agreements.append(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        action.append(squares)
        future.append(np.mean(agreements))
    has_future = np.asarray(inputs.has_future)
    assert has_future.any() and not has_future.all()
    np.testing.assert_allclose(found.action, [np.sum(squares) for squares in action], rtol=1e-4)
    np.testing.assert_array_equal(found.action_weight, [len(squares) for squares in action])
    np.testing.assert_allclose(found.future, np.where(has_future, future, 0), atol=1e-5)
    np.testing.assert_array_equal(found.future_weight, has_future)
    means = np.mean(np.concatenate([*action])), np.mean(np.asarray(future)[has_future])
    np.testing.assert_allclose(found.means(), means, rtol=1e-4)


def losses_of(policy: Policy, target: Bridge, inputs: Inputs, keys: jax.Array, *, train: bool = True) -> Any:
    return losses(policy, target, inputs.intent, inputs.robots, inputs.chunks, inputs.future, inputs.has_future, keys, train=train)


def test_a_batch_without_futures_has_no_future_loss(policy: Policy) -> None:
    """Whatever stands in the place of a future that is not there."""
    batch = POOL.take(slice(0, 4))
    nothing = replace(batch, has_future=np.zeros(4, bool))
    broken = replace(nothing, future=replace(batch.future, hidden=np.full_like(batch.future.hidden, np.nan)))
    target = make_target(policy)
    value, slopes = loss_and_slopes(policy, target, nothing, KEYS[:4])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes[0].future_head))
    assert_close(loss_and_slopes(policy, target, broken, KEYS[:4]), (value, slopes))


def test_gradients_reach_what_they_should(policy: Policy) -> None:
    """Rows of robots that are not in the batch stay as they are, bit by bit; so does the target; all else moves."""
    present = POOL.take(np.asarray([2, 6, 0, 4]))  # robots 2 and 0
    _, (slopes, target) = loss_and_slopes(policy, make_target(policy), present, KEYS[:4])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(target))
    stepped = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, policy, slopes)
    before, after = (jax.tree_util.tree_leaves_with_path(x.embodiments) for x in (policy, stepped))
    for (path, old), (_, new) in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[np.asarray([1, 3])], new[np.asarray([1, 3])], err_msg=jax.tree_util.keystr(path))
        assert all(np.any(old[robot] != new[robot]) for robot in (0, 2)), path
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.any(slope), path


def test_times_are_drawn_as_they_should() -> None:
    config, keys = ObjectiveConfig(), jax.random.split(jax.random.key(0), 5000)

    def by_beta(time: np.ndarray) -> np.ndarray:
        return 1 - stats.beta(1.5, 1).cdf(0.999 * (1 - time))

    expected: dict[Path, Any] = {"flow": by_beta, "clean": by_beta, "ddim": stats.uniform.cdf}
    for path, distribution in expected.items():
        draw = PATHS[path].time
        times = np.asarray(jax.vmap(lambda key, draw=draw: draw(key, config))(keys))
        assert times.min() >= 0 and times.max() <= 1
        assert stats.kstest(times, distribution).pvalue > 0.01


# What is drawn in training


def test_hidden_states_are_states_of_zero(policy: Policy) -> None:
    """As often as the configuration says, by row; never outside of training, where nothing else is dropped either."""
    quiet = make_policy(small(objective=dict(prefix=3, draws=2)))
    rows = np.arange(64) % 8
    inputs, keys, target = POOL.take(rows), jax.random.split(jax.random.key(2), 64), make_target(policy)
    run = jax.jit(losses_of, static_argnames="train")
    hiding = make_policy(small(objective=dict(prefix=3, draws=2), embodiment=dict(state_dropout=0.3)))
    unseen = replace(inputs, robots=replace(inputs.robots, state_mask=np.zeros_like(inputs.robots.state_mask)))
    shown, hidden, mixed = (np.asarray(run(p, target, x, keys).action) for p, x in ((quiet, inputs), (quiet, unseen), (hiding, inputs)))
    tells = ~np.isclose(shown, hidden, **CLOSE)  # not where all steps are given, and the loss is zero
    is_hidden = np.isclose(mixed, hidden, **CLOSE)[tells]
    assert (is_hidden | np.isclose(mixed, shown, **CLOSE)[tells]).all() and tells.mean() > 0.8
    assert abs(is_hidden.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / len(is_hidden))
    assert_close(run(policy, target, inputs, keys, train=False), run(quiet, target, inputs, keys))


def test_dropout_keeps_the_mean(policy: Policy) -> None:
    drop = jax.jit(lambda keys: policy.dit._dropout(keys, jnp.int32(1))(jnp.ones((len(keys), 5, 40)), 0))
    dropped = np.asarray(drop(jax.random.split(jax.random.key(0), 400)))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
    assert dropped.mean() == pytest.approx(1, abs=4 * np.sqrt(0.3 / 0.7 / dropped.size))


# What programs hold


def test_acting_needs_no_block_above_k_and_no_head() -> None:
    """Their weights are poisoned, the loop over blocks is k long, and no product of the program has the vocabulary's size."""
    backbone = CASES["plain"]
    config = replace(SMALL, intent_width=backbone.decoder.width, intent_block=1)
    policy, batch = make_policy(config), meshes.put(make_batch(backbone), None)
    robots, noise = make_inputs(config, rows=3).robots, make_noise(config, 3)

    def act(tree: dict[str, Any], policy: Policy) -> jax.Array:
        hidden = with_params(backbone, ComputeConfig(), tree).hidden(batch, config.intent_block)
        intent = IntentRows(hidden, batch.segments > 0, jnp.zeros((*hidden.shape[:2], 4), jnp.int32))
        return sample(policy, policy.condition(intent, robots), noise, 2)

    def poison(tree: dict[str, Any]) -> dict[str, Any]:
        decoder = dict(tree["decoder"])
        decoder["blocks"] = jax.tree.map(lambda leaf: leaf.at[config.intent_block :].set(jnp.nan), decoder["blocks"])
        decoder["norm"], decoder["head"] = jax.tree.map(lambda leaf: leaf * jnp.nan, (decoder["norm"], decoder["head"]))
        return {**tree, "decoder": decoder}

    tree = random_params(backbone, jnp.float32, None, seed=0)
    program = jax.jit(act).lower(tree, policy).compile()
    found = program(tree, policy)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, program(poison(tree), policy))

    parts = list(equations(jax.make_jaxpr(act)(tree, policy).jaxpr))
    # The tower's loops come first, then the decoder's, then those of bridge (2 blocks) and DiT (2 pairs, and 2 steps).
    assert [part.params["length"] for part in parts if part.primitive.name == "scan"][-5:] == [config.intent_block, 2, 2, 2, 2]
    shapes = [x.aval.shape for part in parts if part.primitive.name == "dot_general" for x in part.outvars]
    assert shapes and not any(backbone.decoder.vocab in shape for shape in shapes)


def test_the_loop_over_steps_makes_nothing_of_the_observation_again(policy: Policy) -> None:
    """For any number of steps: keys and values once a layer, and then the weights they come from may be anything."""
    inputs = POOL.take(slice(0, 2))
    kernel = (SMALL.bridge.width, SMALL.dit.heads, SMALL.dit.head_dim)  # from the bridge's tokens to keys, or to values

    def act(policy: Policy, steps: int) -> jax.Array:
        return sample(policy, policy.condition(inputs.intent, inputs.robots), NOISE[:6], steps)

    counts = []
    for steps in (1, 4, 16):
        program = jax.make_jaxpr(act, static_argnums=1)(policy, steps).jaxpr
        loop = [equation for equation in program.eqns if equation.primitive.name in ("scan", "while")][-1]
        counts.append((products(program, kernel), products_in_loop(loop, kernel), len(list(equations(program)))))
    assert counts == [(2, 0, counts[0][2])] * 3

    condition = jax.jit(Policy.condition)(policy, inputs.intent, inputs.robots)
    poisoned = jax.tree.map(jnp.asarray, policy)
    for part in (poisoned.bridge, poisoned.dit.pairs.cross.layer.k, poisoned.dit.pairs.cross.layer.v, poisoned.embodiments.state_inner):
        nnx.update(part, jax.tree.map(lambda leaf: leaf * jnp.nan, nnx.state(part)))
    run = jax.jit(sample, static_argnums=3)
    found = run(policy, condition, NOISE[:6], 2)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(run(poisoned, condition, NOISE[:6], 2), found)


def products(program: Any, operand: tuple[int, ...]) -> int:
    dots = [equation for equation in equations(program) if equation.primitive.name == "dot_general"]
    return sum(any(x.aval.shape == operand for x in equation.invars) for equation in dots)


def products_in_loop(loop: Any, operand: tuple[int, ...]) -> int:
    bodies = jax.tree.leaves(loop.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    programs = [getattr(body, "jaxpr", body) for body in bodies if hasattr(body, "eqns") or hasattr(body, "jaxpr")]
    assert any(products(program, (SMALL.dit.width, SMALL.dit.ffn)) for program in programs)  # it is the loop with the DiT in it
    return sum(products(program, operand) for program in programs)


def test_samples_of_an_observation_are_as_if_it_were_given_for_each(policy: Policy) -> None:
    """And one program serves all values of a shape."""
    traces = []

    @jax.jit
    def run(policy: Policy, inputs: Inputs, noise: jax.Array) -> jax.Array:
        traces.append(0)
        return sample(policy, policy.condition(inputs.intent, inputs.robots), noise, 2)

    few, many = POOL.take(slice(0, 2)), POOL.take(np.repeat([0, 1], 3))
    np.testing.assert_allclose(run(policy, few, NOISE[:6]), run(policy, many, NOISE[:6]), **CLOSE)
    other = replace(POOL.take(slice(5, 7)), has_future=np.ones(2, bool))
    run(make_policy(TRAINED, seed=9), other, NOISE[2:8])
    assert len(traces) == 2  # one for each of the two shapes


@pytest.mark.parametrize("sizes", ["small", "full"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_bfloat16_and_full_size_have_the_right_shapes(sizes: str, remat: Any) -> None:
    """Nothing is computed: a type that differs from one layer to the next does not get this far."""
    config = TRAINED if sizes == "small" else PolicyConfig(objective=ObjectiveConfig(prefix=4))

    def run(keys: jax.Array) -> Any:
        policy = Policy(config, ComputeConfig(dtype="bfloat16", remat=remat), rngs=nnx.Rngs(0))
        shape = (4, config.embodiment.state_width), (4, config.horizon, config.embodiment.action_width)
        intent = IntentRows(jnp.zeros((4, 9, config.intent_width)), jnp.ones((4, 9), bool), jnp.zeros((4, 9, 4), jnp.int32))
        robots = RobotRows(jnp.arange(4), jnp.zeros(shape[0]), jnp.ones(shape[0], bool), jnp.ones(shape[1], bool))
        inputs = Inputs(intent, robots, Chunks(jnp.zeros(shape[1]), jnp.ones(shape[1], bool)), intent, jnp.ones(4, bool))
        slopes = jax.grad(loss_of)(policy, policy.bridge, inputs, keys)
        committed = Committed(jnp.zeros(shape[1]), jnp.int32(2), jnp.int32(3))
        return slopes, policy, sample(policy, policy.condition(intent, robots), jnp.zeros(shape[1]), 2, committed)

    slopes, policy, actions = jax.eval_shape(run, KEYS[:4])
    assert actions.shape == (4, config.horizon, config.embodiment.action_width) and actions.dtype == jnp.float32
    for slope, leaf in zip(jax.tree.leaves(slopes), jax.tree.leaves(policy), strict=True):
        assert slope.shape == leaf.shape and slope.dtype == leaf.dtype == jnp.float32


# Places


@pytest.mark.parametrize("places", [True, False])
def test_the_bridge_tells_where_things_are(places: bool) -> None:
    """A thing of four tokens, moved over a background that is the same everywhere: bridge as it is made, read by a linear probe."""
    config = BridgeConfig(queries=4, blocks=2, width=64, heads=4, ffn=64, places=places, cameras=1)
    bridge = Bridge(config, 24, "float32", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(12), np.arange(12), indexing="ij"), axis=-1).reshape(-1, 2)
    offsets = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    spots = np.zeros((len(corners), 4, 4), np.int32)
    spots[..., 0], spots[..., 1:3] = 1, corners[:, None] + offsets
    hidden = np.tile(rng.standard_normal((4, 24)).astype(np.float32), (len(corners), 1, 1))
    tokens = np.asarray(jax.jit(Bridge.__call__)(bridge, IntentRows(hidden, np.ones((len(corners), 4), bool), spots)))
    if not places:
        np.testing.assert_array_equal(tokens, np.broadcast_to(tokens[:1], tokens.shape))
        return
    features = tokens.reshape(len(corners), -1)
    assert np.abs(features[:, None] - features[None]).max(axis=-1)[~np.eye(len(corners), dtype=bool)].min() > 1e-3
    assert probe(features, corners.astype(float), rng) > 0.9


def probe(features: np.ndarray, answers: np.ndarray, rng: np.random.Generator) -> float:
    """R^2 on held-out rows of a ridge regression."""
    order = rng.permutation(len(features))
    train, held = order[: len(order) * 2 // 3], order[len(order) * 2 // 3 :]
    mean, scale = features[train].mean(axis=0), features[train].std(axis=0) + 1e-6
    x, y = (features - mean) / scale, answers - answers[train].mean(axis=0)
    weights = np.linalg.solve(x[train].T @ x[train] + 1.0 * np.eye(x.shape[1]), x[train].T @ y[train])
    return 1 - ((x[held] @ weights - y[held]) ** 2).sum() / (y[held] ** 2).sum()


# Meshes


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)], ids=["4x2", "2x2x2"])
def test_sharded_equals_unsharded(policy: Policy, clean_rows: Any, shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*shape))

    def make() -> Policy:
        return Policy(TRAINED, ComputeConfig(), rngs=nnx.Rngs(0))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes_of(make, jnp.float32, mesh))
    divided = around(make, jax.device_put(nnx.to_pure_dict(nnx.state(policy, nnx.Param)), shardings))
    kernel = divided.dit.pairs.own.layer.up.kernel
    assert kernel.addressable_shards[0].data.shape == (2, 40 // shape[1], 56 // shape[2])
    rows = jax.sharding.NamedSharding(mesh, meshes.RULES.spec(("batch",)))
    with meshes.use(mesh):
        found = jax.jit(everything)(divided, meshes.put(CLEAN, mesh), jax.device_put(KEYS, rows), meshes.put(CLEAN_NOISE, mesh))
    assert_close(found, clean_rows)
