"""Our count of a step's operations, against products in the program that JAX makes of it, and against the compiler's own count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax import counts
from blm_jax.batch import Batch, IntentRows, Moments, Prompts
from blm_jax.config import BackboneConfig, ComputeConfig, LoraConfig, PolicyConfig, Remat
from blm_jax.data.collate import collate
from blm_jax.models.mllm import abstract_params, with_params
from blm_jax.models.objective import losses
from blm_jax.models.policy import abstract_policy, policy_with_params
from blm_jax.train.select import joined
from blm_jax.train.work import StepWork, WorkCount, peak, segment_lengths
from blm_jax.weights.names import leaves, nested
from tests.models.chats import IMAGE, IMAGES, TEXT, VIDEO, make_example
from tests.models.oracle import CASES
from tests.models.policies import SMALL, make_inputs

PLAIN = CASES["plain"]
# One window layer, one with full attention: the tower's loops go round once, and the compiler takes them for no loops.
CONFIG = replace(PLAIN, vision=replace(PLAIN.vision, layers=2, full_attention_layers=(1,)), decoder=replace(PLAIN.decoder, layers=2))
POLICY = replace(SMALL, robots=("panda",), intent_width=CONFIG.decoder.width)  # of one robot: the table's other rows are no work


def products(jaxpr: Any, times: int = 1) -> int:
    """Operations of all products of a program, loops as often as they go round; the exact choice of a robot's row is none."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and "HIGHEST" not in str(equation.params["precision"]):
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += times * 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        inside = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += products(getattr(inner, "jaxpr", inner), inside)
    return total


def full(batch: Batch) -> Batch:
    """The same shapes without padding: a row is one example, every token counts, every vision row is one frame of full windows."""
    assert batch.vision is not None
    vision = replace(batch.vision, windows=np.ones_like(batch.vision.windows), frames=np.ones_like(batch.vision.frames))
    return replace(batch, segments=np.ones_like(batch.segments), weights=np.ones_like(batch.weights), vision=vision)


def chats(config: BackboneConfig = CONFIG) -> Batch:
    return collate([[make_example(config, grids, seed=i)] for i, grids in enumerate((IMAGE, TEXT))], config)


def upper_corner(count: WorkCount, batch: Batch) -> int:
    """What our plain attention computes above the diagonal: rows as short as these are one block."""
    rows, length = batch.tokens.shape
    rate = count.rates["decoder", "pairs"]
    return rows * (length**2 - length * (length + 1) // 2) * (rate.forward + rate.backward + rate.repeated)


def name_of(path: Iterable[Any]) -> str:
    return ".".join(part for part in path if isinstance(part, str))  # without a layer's number


def unstacked(tree: dict[str, Any]) -> dict[str, Any]:
    blocks = tree["decoder"]["blocks"]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks)
    return {**tree, "decoder": {**tree["decoder"], "blocks": dict.fromkeys(range(CONFIG.decoder.layers), one)}}


class Case(NamedTuple):
    trained: Callable[[str], bool]
    config: BackboneConfig = CONFIG
    remat: Remat = "none"
    stacked: bool = False  # as it is trained; taken apart otherwise, as a loop asks of each layer what one of them needs
    lora: LoraConfig | None = None


def step_of(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...], WorkCount, Batch]:
    """The slopes of a loss on logits, what to trace them with, and our count of them."""
    config, batch = case.config, full(chats(case.config))
    tree = abstract_params(config, lora=case.lora)
    flat = dict(leaves(tree if case.stacked else unstacked(tree)))
    trained, frozen = (nested({path: x for path, x in flat.items() if case.trained(name_of(path)) == own}) for own in (True, False))
    compute = ComputeConfig(attention="xla", remat=case.remat)

    def loss(trained: Any, frozen: Any, batch: Batch) -> jax.Array:
        model = with_params(config, compute, joined(trained, frozen), apart=not case.stacked, lora=case.lora)
        return jnp.sum(jax.nn.logsumexp(model(batch), axis=-1))

    names = {name_of(path) for path in flat if case.trained(name_of(path))}
    ranks = {} if case.lora is None else {f"decoder.blocks.{name}": case.lora.rank for name in case.lora.targets}
    count = WorkCount(config, trained=names, ranks=ranks, remat=case.remat)
    return (jax.grad(loss) if names else loss), (trained, frozen, jax.eval_shape(lambda: batch)), count, batch


CASES_OF_STAGE_ONE = {
    "forward": Case(lambda name: False),
    "all of it": Case(lambda name: True),
    "the decoder's blocks: nothing passes to the tower": Case(lambda name: name.startswith("decoder.blocks")),
    "the merger: gradients pass through all of the decoder": Case(lambda name: name.startswith("vision.merger")),
    "the head alone": Case(lambda name: name.startswith("decoder.head")),
    "queries and one bias": Case(lambda name: name in ("decoder.blocks.q.kernel", "decoder.blocks.v.bias")),
    "norms": Case(lambda name: name == "decoder.blocks.ffn_norm.scale"),
    "adapters": Case(lambda name: "adapter" in name, lora=LoraConfig(4, 8.0, ("q", "v", "down"))),
    "a tied head, made again": Case(lambda name: True, replace(CONFIG, decoder=replace(CONFIG.decoder, tied=True)), "full", True),
    "adapters, made again": Case(
        lambda name: "adapter" in name or "embed" in name, CONFIG, "full", True, LoraConfig(3, 8.0, ("out", "down"))
    ),
    "the tower frozen, nothing of it made again": Case(lambda name: name.startswith("decoder"), stacked=True, remat="full"),
    "products kept": Case(lambda name: True, stacked=True, remat="dots"),
    "attention made again": Case(lambda name: True, stacked=True, remat="dots_no_batch"),
}


@pytest.mark.parametrize("case", CASES_OF_STAGE_ONE.values(), ids=CASES_OF_STAGE_ONE.keys())
def test_stage_one(case: Case) -> None:
    """Products: exactly. The compiler counts norms, rotations, softmax and sums too: some percent where layers are a few dozen wide."""
    step, inputs, count, batch = step_of(case)
    work = count(batch)
    computed = work.needed + work.repeated + upper_corner(count, batch)
    traced = jax.jit(step).trace(*inputs)
    assert products(traced.jaxpr.jaxpr) == computed
    assert bool(work.repeated) == (case.remat in ("full", "dots_no_batch"))
    if not case.stacked:  # of a loop it counts the body once
        found: Any = traced.lower().cost_analysis()
        assert 1 < found["flops"] / computed < 1.06


# --- Stage II ------------------------------------------------------------------------------------------------------------


def moments_of(policy: PolicyConfig, seen: Any, future: Any) -> Moments:
    """Nothing absent: every dimension, step and token is there."""
    inputs = make_inputs(policy, rows=2, tokens=11)
    robots = replace(inputs.robots, action_mask=np.ones_like(inputs.robots.action_mask))
    parts = (seen, future) if seen is not None else (inputs.intent, inputs.future)
    seen, future = (replace(part, mask=np.ones_like(part.mask)) for part in parts)
    return Moments(robots, inputs.chunks, np.ones(2, bool), seen, future)


def traced(policy: PolicyConfig, moments: Moments, trained: Callable[[str], bool], compute: ComputeConfig) -> int:
    flat = dict(leaves(abstract_policy(policy)))
    own, rest = (nested({path: x for path, x in flat.items() if trained(name_of(("policy", *path))) == mine}) for mine in (True, False))
    backbone = abstract_params(CONFIG)

    def loss(own: Any, rest: Any, backbone: Any, moments: Moments) -> jax.Array:
        def look(seen: Prompts | IntentRows) -> IntentRows:
            return seen if isinstance(seen, IntentRows) else with_params(CONFIG, compute, backbone).intent(seen, policy.intent_block)

        learner = policy_with_params(policy, compute, joined(own, rest))
        slow = jax.tree.map(jax.lax.stop_gradient, learner.bridge)
        keys = jax.random.split(jax.random.key(0), 2)
        seen, future = look(moments.seen), look(moments.future)
        found = losses(learner, slow, seen, moments.robots, moments.chunks, future, moments.has_future, keys)
        return found.total(policy.objective)

    return products(jax.make_jaxpr(jax.grad(loss))(own, rest, backbone, moments).jaxpr)


CASES_OF_STAGE_TWO = {
    "from intents": (POLICY, lambda name: True, "none"),
    "two draws, given prefixes, no places, tapped at the top; made again": (
        replace(
            POLICY,
            objective=replace(POLICY.objective, draws=2, prefix=2),
            bridge=replace(POLICY.bridge, places=False),
            dit=replace(POLICY.dit, tap=4),
        ),
        lambda name: True,
        "full",
    ),
    "the robot's own": (POLICY, lambda name: name.startswith("policy.embodiments"), "none"),
}


@pytest.mark.parametrize(("policy", "trained", "remat"), CASES_OF_STAGE_TWO.values(), ids=CASES_OF_STAGE_TWO.keys())
def test_stage_two(policy: PolicyConfig, trained: Callable[[str], bool], remat: Remat) -> None:
    moments = moments_of(policy, None, None)
    names = [name for path, _ in leaves(abstract_policy(policy)) if trained(name := name_of(("policy", *path)))]
    work = WorkCount(None, policy, trained=names, remat=remat)(moments)
    assert traced(policy, moments, trained, ComputeConfig(attention="xla", remat=remat)) == work.needed + work.repeated
    assert work.operations.keys() == {"bridge", "dit"} and (work.rows, work.tokens) == (2, 44)


def test_stage_two_with_its_backbone() -> None:
    """Now and a chunk later, up to block k, forward alone: what is frozen with nothing trained beneath has no backward pass."""
    batch = full(chats())
    prompts = Prompts(batch, np.ones(batch.tokens.shape, bool), np.zeros((*batch.tokens.shape, 4), np.int32))
    moments = moments_of(POLICY, prompts, prompts)
    names = [name_of(("policy", *path)) for path, _ in leaves(abstract_policy(POLICY))]
    count = WorkCount(CONFIG, POLICY, trained=names, remat="full")
    work = count(moments)
    found = traced(POLICY, moments, lambda name: True, ComputeConfig(attention="xla", remat="full"))
    assert found == work.needed + work.repeated + 2 * upper_corner(count, batch)
    assert all(rate.backward == 0 for (component, _), rate in count.rates.items() if component in ("vision", "decoder"))
    assert work.tokens == 2 * batch.tokens.size


# --- what is counted -------------------------------------------------------------------------------------------------------


def test_padding_and_other_segments_are_not_counted() -> None:
    """Against formulas by length and size that know of no rows: three conversations packed into two rows, pictures beside them."""
    examples = [make_example(CONFIG, grids, seed=i) for i, grids in enumerate((IMAGES, VIDEO, TEXT))]
    batch = collate([[examples[0], examples[2]], [examples[1]]], CONFIG, length=200)
    work = WorkCount(CONFIG, trained=())(batch)
    sizes = [(4, 6), (16, 8), (2, 22), *[(6, 10)] * 3]
    decoder = sum(counts.decoder_operations(CONFIG.decoder, 1, len(example.tokens), 0) for example in examples)
    supervised = sum(int(example.supervised[1:].sum()) for example in examples)
    assert work.operations == {
        "vision": counts.vision_operations(CONFIG.vision, sizes),
        "decoder": decoder,
        "head": 2 * supervised * CONFIG.decoder.width * CONFIG.decoder.vocab,
    }
    assert work == StepWork(2, sum(len(example.tokens) for example in examples), work.operations, 0)


def test_absent_steps_and_futures_are_not_counted() -> None:
    policy = replace(POLICY, objective=replace(POLICY.objective, draws=3))
    moments = moments_of(policy, None, None)
    count = WorkCount(None, policy, trained=["policy.bridge.queries"])
    mask = np.array(moments.robots.action_mask)
    mask[1, 3:] = False
    short = replace(moments, robots=replace(moments.robots, action_mask=mask), has_future=np.array([True, False]))
    amounts, future = count._of_moments(short)
    tokens = 1 + policy.bridge.queries + np.array([policy.horizon, 3])
    assert (amounts["action_tokens"], amounts["dit_tokens"], amounts["dit_pairs"]) == (
        3 * (policy.horizon + 3),
        3 * tokens.sum(),
        3 * (tokens**2).sum(),
    )
    assert (amounts["future_draws"], future["observations"], amounts["observations"]) == (3, 1, 2)
    assert count(short).needed < count(moments).needed

    patched = replace(policy, horizon=8, embodiment=replace(policy.embodiment, patch=2))
    mask = np.pad(mask, ((0, 0), (0, 8 - mask.shape[1]), (0, 0)))  # of 7 steps and of 3: 4 tokens and 2
    amounts, _ = WorkCount(None, patched, trained=())._of_moments(replace(short, robots=replace(short.robots, action_mask=mask)))
    assert amounts["action_tokens"] == 3 * (4 + 2)


def test_a_batch_in_parts() -> None:
    batch = chats()
    one, four = (WorkCount(CONFIG, trained={"decoder.norm.scale"}, remat="full", parts=parts)(batch) for parts in (1, 4))
    assert (four.rows, four.tokens, four.needed) == (4 * one.rows, 4 * one.tokens, 4 * one.needed)
    assert four.operations == {name: 4 * count for name, count in one.operations.items()}


def test_segment_lengths() -> None:
    segments = np.array([[1, 1, 2, 0, 0], [3, 1, 3, 0, 3], [0, 0, 0, 0, 0], [7, 7, 7, 7, 7]])
    np.testing.assert_array_equal(segment_lengths(segments), [2, 1, 1, 3, 5])


def test_peak() -> None:
    class Device(NamedTuple):
        device_kind: str

    assert peak([Device("TPU v5 lite")] * 4) == 4 * 197e12
    assert peak(jax.devices()) is None  # a CPU
    assert peak([Device("TPU v5 lite"), Device("cpu")]) is None
    assert peak([]) is None
