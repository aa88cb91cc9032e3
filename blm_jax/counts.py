"""How much a phase asks of a machine at least: parameters, operations, bytes. And what machines can give.

An operation is a multiplication or an addition, so a product of [m, k] and [k, n] has 2 m k n. Only products are counted, causal
attention without what it masks, and nothing for padding or recomputation: what is computed beyond that is loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from blm_jax.config import BackboneConfig, DecoderConfig, PolicyConfig, Remat, VisionConfig
from blm_jax.weights.names import table
from blm_jax.weights.policy import PLACE_VALUES

Size = tuple[int, int]  # rows and columns of a picture in patches


class Chip(NamedTuple):
    tflops: float  # dense, bfloat16
    bandwidth: float  # of its memory, GB/s


# The makers' data sheets, by what jax calls the device.
CHIPS = {
    "H200": Chip(989, 4800),
    "TPU v5 lite": Chip(197, 819),
    "TPU v5e": Chip(197, 819),
    "TPU v5p": Chip(459, 2765),
    "TPU v5": Chip(459, 2765),
    "TPU v6 lite": Chip(918, 1640),
    "TPU v6e": Chip(918, 1640),
}


def chip_of(device_kind: str) -> Chip | None:
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def parameters(config: BackboneConfig) -> int:
    return sum(math.prod(entry.shape) for entry in table(config).values())


def layer_weights(config: DecoderConfig) -> int:
    """Of the kernels of one layer of the decoder."""
    attention = 2 * config.width * (config.heads + config.kv_heads) * config.head_dim
    return attention + 3 * config.width * config.ffn


def decoder_operations(config: DecoderConfig, rows: int, length: int, logits: int) -> int:
    """Forward over rows x length tokens, `logits` of which are asked for their next token."""
    pairs = rows * length * (length + 1) // 2  # of a query and a key it sees
    attention = 4 * pairs * config.heads * config.head_dim
    products = 2 * rows * length * layer_weights(config)
    return config.layers * (products + attention) + 2 * logits * config.width * config.vocab


def vision_operations(config: VisionConfig, sizes: Iterable[Size]) -> int:
    full = len(config.full_attention_layers)
    side = config.window // config.patch // config.merge * config.merge
    width, merged = config.width, config.merge**2 * config.width
    total = 0
    for rows, columns in sizes:
        patches = rows * columns
        products = config.patch_values * width + config.layers * (4 * width**2 + 3 * width * config.ffn)
        merger = patches // config.merge**2 * (merged**2 + merged * config.out_width)
        pairs = full * patches**2 + (config.layers - full) * _squares(rows, side) * _squares(columns, side)
        total += 2 * (patches * products + merger) + 4 * pairs * width
    return total


def _squares(length: int, side: int) -> int:
    """Of the lengths of windows along one axis, summed: the last one may be short."""
    return length // side * side**2 + (length % side) ** 2


def decode_bytes(config: DecoderConfig, rows: int, context: int, itemsize: int) -> int:
    """Read to choose one token in each row: all weights once, and the keys and values of `context` tokens a row."""
    weights = config.layers * layer_weights(config) + config.width * config.vocab
    cache = 2 * rows * context * config.layers * config.kv_heads * config.head_dim
    return itemsize * (weights + cache)


# --- acting --------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    operations: int
    bytes: int

    def seconds(self, chip: Chip) -> float:
        """The least that a chip needs, whichever of the two takes it longer."""
        return max(self.operations / (chip.tflops * 1e12), self.bytes / (chip.bandwidth * 1e9))


def acting(
    backbone: BackboneConfig, policy: PolicyConfig, rows: int, samples: int, sizes: Sequence[Size], length: int, itemsize: int
) -> dict[str, Work]:
    """Of `rows` observations of `length` tokens, `sizes` their pictures: parts that follow each other, each reading its weights.

    The table of robots is read for one. Activations are taken to stay where they are made.
    """
    k, steps, tokens = policy.intent_block, policy.objective.steps, rows * length
    decoder = replace(backbone.decoder, layers=k)
    seen = rows * policy.dit.layers * policy.bridge.queries * policy.dit.width  # keys and values of every other layer
    parts = {
        "vision": Work(vision_operations(backbone.vision, sizes), vision_weights(backbone)),
        "decoder": Work(decoder_operations(decoder, rows, length, 0), k * layer_weights(decoder)),
        "bridge": Work(bridge_operations(policy, rows, tokens), bridge_weights(policy)),
        "denoising": Work(steps * step_operations(policy, rows * samples), steps * (step_weights(policy) + seen)),
    }
    return {name: Work(work.operations, work.bytes * itemsize) for name, work in parts.items()}


def vision_weights(config: BackboneConfig) -> int:
    return sum(math.prod(entry.shape) for entry in table(config).values() if entry.path[0] == "vision")


def attention_layer(width: int, ffn: int, memory: int) -> int:
    """Kernels of a layer of bridge or DiT that attends to something `memory` wide."""
    return 2 * width * width + 2 * memory * width + 2 * width * ffn


def bridge_weights(config: PolicyConfig) -> int:
    """With what makes the DiT's keys and values, and encodes the state: all that is used once an observation."""
    bridge, body = config.bridge, config.embodiment
    enter = (config.intent_width + (PLACE_VALUES if bridge.places else 0)) * bridge.width
    blocks = bridge.blocks * 2 * attention_layer(bridge.width, bridge.ffn, bridge.width)
    state = (body.state_width + config.dit.width) * body.hidden
    return enter + blocks + config.dit.layers // 2 * 2 * bridge.width * config.dit.width + state


def bridge_operations(config: PolicyConfig, rows: int, tokens: int) -> int:
    bridge, body = config.bridge, config.embodiment
    width, queries = bridge.width, rows * bridge.queries
    enter = tokens * (config.intent_width + (PLACE_VALUES if bridge.places else 0)) * width
    own = 4 * width**2 + 2 * width * bridge.ffn  # by query
    cross = 2 * width**2 + 2 * width * bridge.ffn
    attention = 2 * width * bridge.queries * (tokens + queries)
    blocks = bridge.blocks * (queries * (own + cross) + 2 * tokens * width**2 + attention)
    memory = config.dit.layers // 2 * 2 * queries * width * config.dit.width
    return 2 * (enter + blocks + memory + rows * (body.state_width + config.dit.width) * body.hidden)


def step_weights(config: PolicyConfig) -> int:
    """Read in each denoising step."""
    width, layers, body = config.dit.width, config.dit.layers, config.embodiment
    pair = 2 * attention_layer(width, config.dit.ffn, width) - 2 * width**2  # the cross-attention's keys and values are there
    held = body.patch * body.action_width
    actions = held * width + 3 * width**2 + (width + held) * body.hidden
    return layers // 2 * pair + _time_weights(config) + actions


def step_operations(config: PolicyConfig, rows: int) -> int:
    """One denoising step; all rows are at the same time."""
    width, queries, body = config.dit.width, config.bridge.queries, config.embodiment
    tokens, held = 1 + queries + config.action_tokens, body.patch * body.action_width
    pair = tokens * (6 * width**2 + 4 * width * config.dit.ffn + 2 * width * (queries + tokens))
    actions = config.action_tokens * (held * width + 3 * width**2 + (width + held) * body.hidden)
    return 2 * (rows * (config.dit.layers // 2 * pair + actions) + _time_weights(config))


def _time_weights(config: PolicyConfig) -> int:
    width = config.dit.width
    return (config.dit.time_features + width) * width + (config.dit.layers + 1) * 2 * width**2


# --- Stage II ------------------------------------------------------------------------------------------------------------


def intent_operations(backbone: BackboneConfig, policy: PolicyConfig, sizes: Sequence[Size], length: int) -> int:
    """Of one observation of `length` tokens, `sizes` its pictures, up to block k."""
    decoder = replace(backbone.decoder, layers=policy.intent_block)
    return vision_operations(backbone.vision, sizes) + decoder_operations(decoder, 1, length, 0)


def learning_operations(policy: PolicyConfig, tokens: int) -> int:
    """Of one moment of `tokens` of intent: forward and backward, and the slow bridge's look at the future."""
    bridge = bridge_operations(policy, 1, tokens)
    return 3 * (bridge + policy.objective.draws * step_operations(policy, 1)) + bridge


# --- training --------------------------------------------------------------------------------------------------------------

Component = Literal["vision", "decoder", "head", "bridge", "dit"]
# What products are counted by. A pair is a query and a key that it sees. `observations` are what the bridge looks at, now and a
# chunk later; `moments` are those of now alone; `draws` are of noise; `dit_tokens`, `dit_pairs`, `action_tokens` are summed over them.
Unit = Literal[
    "patches",
    "window_pairs",
    "frame_pairs",
    "cells",
    "tokens",
    "pairs",
    "logits",
    "intent_tokens",
    "observations",
    "moments",
    "draws",
    "dit_tokens",
    "dit_pairs",
    "action_tokens",
    "future_draws",
]


class Rate(NamedTuple):
    """Operations for one of a unit."""

    forward: int
    backward: int
    repeated: int  # of `forward`, once more on the way back: not kept by `remat`


Rates = dict[tuple[Component, Unit], Rate]


@dataclass
class _Tape:
    """Products in the order of the forward pass, which is the order in which gradients are found to be wanted.

    A product costs its size forward, as much again if its input wants a gradient, and as much again if its kernel is trained.
    All methods take whether gradients are wanted of what goes in, and return whether they are of what comes out.
    """

    trained: AbstractSet[str]  # arrays of the parameter tree, "decoder.blocks.q.kernel"
    ranks: Mapping[str, int]  # of the low-rank pairs beside kernels, by "decoder.blocks.q"
    remat: Remat
    component: Component = "vision"
    forward: Counter[tuple[Component, Unit]] = field(default_factory=Counter)
    backward: Counter[tuple[Component, Unit]] = field(default_factory=Counter)
    unkept: Counter[tuple[Component, Unit]] = field(default_factory=Counter)
    repeated: Counter[tuple[Component, Unit]] = field(default_factory=Counter)

    def rates(self) -> Rates:
        return {key: Rate(self.forward[key], self.backward[key], self.repeated[key]) for key in self.forward}

    def learns(self, *names: str) -> bool:
        return any(name in self.trained for name in names)

    def product(self, name: str, size: int, unit: Unit, wanted: bool, *, kernel: str = "kernel", last: bool = False) -> bool:
        """`size` multiplications a unit with a kernel. Nothing looks at what the `last` product of a block gave, on the way back."""
        own = self.learns(f"{name}.{kernel}")
        self._add(unit, 2 * size, wanted + own, kept=last)
        return wanted or own or self.learns(f"{name}.bias")

    def linear(self, name: str, inputs: int, outputs: int, unit: Unit, wanted: bool, *, count: int = 1, last: bool = False) -> bool:
        """A product, with the low-rank pair beside it if there is one; `count` of them a unit."""
        out = self.product(name, count * inputs * outputs, unit, wanted, last=last)
        rank = self.ranks.get(name, 0)
        if rank:
            self._add(unit, 2 * count * inputs * rank, wanted + 1)
            self._add(unit, 2 * count * rank * outputs, 2, kept=last)
        return out or rank > 0

    def attention(self, width: int, unit: Unit, q: bool, k: bool, v: bool) -> bool:
        """Scores, and the values they weigh: a product each."""
        self._add(unit, 2 * width, q + k, attention=True)
        self._add(unit, 2 * width, (q or k) + v, attention=True)
        return q or k or v

    def block(self, layer: Callable[[bool], bool], wanted: bool) -> bool:
        """A layer whose activations are made again, but for what `remat` keeps, if anything looks at them."""
        self.unkept.clear()
        wanted = layer(wanted)
        if wanted:
            self.repeated.update(self.unkept)
        return wanted

    def _add(self, unit: Unit, operations: int, backward: int, *, kept: bool = False, attention: bool = False) -> None:
        key = (self.component, unit)
        self.forward[key] += operations
        self.backward[key] += backward * operations
        if not kept and (self.remat == "full" or (self.remat == "dots_no_batch" and attention)):
            self.unkept[key] += operations


def training(
    backbone: BackboneConfig | None, policy: PolicyConfig | None, trained: AbstractSet[str], ranks: Mapping[str, int], remat: Remat
) -> Rates:
    """Of a training step. Without a policy: Stage I. Without a backbone: Stage II from intents that are there."""
    tape = _Tape(trained, ranks, remat)
    wanted = False
    if backbone is not None:
        wanted = _vision(tape, backbone.vision)
        wanted = _decoder(tape, backbone.decoder, wanted, None if policy is None else policy.intent_block)
    if policy is not None:
        _policy(tape, policy, _bridge(tape, policy, wanted))
    return tape.rates()


def _vision(tape: _Tape, config: VisionConfig) -> bool:
    tape.component = "vision"
    width, blocks = config.width, "vision.blocks"

    def layer(wanted: bool, unit: Unit) -> bool:
        made = tape.linear(f"{blocks}.qkv", width, 3 * width, "patches", wanted or tape.learns(f"{blocks}.attn_norm.scale"))
        made = tape.attention(width, unit, made, made, made)
        wanted |= tape.linear(f"{blocks}.out", width, width, "patches", made)
        return _swiglu(tape, blocks, width, config.ffn, "patches", wanted)

    wanted = tape.linear("vision.patch_embed", config.patch_values, width, "patches", False)
    for number in range(config.layers):
        unit: Unit = "frame_pairs" if number in config.full_attention_layers else "window_pairs"
        wanted = tape.block(lambda wanted, unit=unit: layer(wanted, unit), wanted)
    merged = config.merge**2 * width
    wanted = tape.linear("vision.merger.inner", merged, merged, "cells", wanted or tape.learns("vision.merger.norm.scale"))
    return tape.linear("vision.merger.outer", merged, config.out_width, "cells", wanted)


def _swiglu(tape: _Tape, block: str, width: int, ffn: int, unit: Unit, wanted: bool) -> bool:
    normed = wanted or tape.learns(f"{block}.ffn_norm.scale")
    made = [tape.linear(f"{block}.{name}", width, ffn, unit, normed) for name in ("gate", "up")]
    return tape.linear(f"{block}.down", ffn, width, unit, any(made), last=True) or wanted


def _decoder(tape: _Tape, config: DecoderConfig, wanted: bool, blocks: int | None) -> bool:
    """Up to the logits, or to what comes out after so many `blocks`."""
    tape.component = "decoder"
    width, name = config.width, "decoder.blocks"
    columns = {"q": config.heads * config.head_dim, "k": config.kv_heads * config.head_dim, "v": config.kv_heads * config.head_dim}

    def layer(wanted: bool) -> bool:
        normed = wanted or tape.learns(f"{name}.attn_norm.scale")
        q, k, v = (tape.linear(f"{name}.{part}", width, size, "tokens", normed) for part, size in columns.items())
        made = tape.attention(columns["q"], "pairs", q, k, v)
        wanted |= tape.linear(f"{name}.out", columns["q"], width, "tokens", made)
        return _swiglu(tape, name, width, config.ffn, "tokens", wanted)

    wanted |= tape.learns("decoder.embed.embedding")
    for _ in range(config.layers if blocks is None else blocks):
        wanted = tape.block(layer, wanted)
    if blocks is not None:
        return wanted
    tape.component = "head"
    wanted |= tape.learns("decoder.norm.scale")
    head, kernel = ("decoder.embed", "embedding") if config.tied else ("decoder.head", "kernel")
    return tape.product(head, width * config.vocab, "logits", wanted, kernel=kernel)


def _bridge(tape: _Tape, policy: PolicyConfig, wanted: bool) -> bool:
    tape.component = "bridge"
    config, name = policy.bridge, "policy.bridge"
    width, queries = config.width, config.queries
    wanted |= tape.learns(f"{name}.intent_norm.scale", f"{name}.intent_norm.bias")
    keys = tape.linear(f"{name}.project", policy.intent_width, width, "intent_tokens", wanted)
    if config.places:
        keys |= tape.linear(f"{name}.places.project", PLACE_VALUES, width, "intent_tokens", False) or tape.learns(f"{name}.places.cameras")
    x = tape.learns(f"{name}.queries")
    for _ in range(config.blocks):
        k, v = _remember(tape, f"{name}.blocks.cross", width, width, "intent_tokens", 1, keys)
        x = _attend(
            tape, f"{name}.blocks.cross", _Sizes(width, width, config.ffn, "observations", queries), x, (k, v), "intent_tokens", queries
        )
        x = _attend(
            tape, f"{name}.blocks.own", _Sizes(width, width, config.ffn, "observations", queries), x, None, "observations", queries**2
        )
    return x or tape.learns(f"{name}.norm.scale", f"{name}.norm.bias")


class _Sizes(NamedTuple):
    """Of a layer of bridge or DiT, and its tokens: `count` a unit."""

    width: int
    heads: int  # times their size
    ffn: int
    unit: Unit
    count: int


def _remember(tape: _Tape, name: str, memory: int, heads: int, unit: Unit, count: int, wanted: bool) -> tuple[bool, bool]:
    """Keys and values of a layer."""
    return (
        tape.linear(f"{name}.k", memory, heads, unit, wanted, count=count),
        tape.linear(f"{name}.v", memory, heads, unit, wanted, count=count),
    )


def _attend(
    tape: _Tape,
    name: str,
    sizes: _Sizes,
    x: bool,
    memory: tuple[bool, bool] | None,
    pair_unit: Unit,
    pairs: int,
    modulated: bool | None = None,
    last: bool = False,
) -> bool:
    """`pairs` a `pair_unit`. A memory of None: to itself. `modulated` says whether gradients are wanted of the modulation."""
    normed = x or (tape.learns(f"{name}.norm.scale", f"{name}.norm.bias") if modulated is None else modulated)
    width, heads, ffn, unit, count = sizes
    q = tape.linear(f"{name}.q", width, heads, unit, normed, count=count)
    k, v = _remember(tape, name, width, heads, unit, count, normed) if memory is None else memory
    made = tape.attention(pairs * heads, pair_unit, q, k, v)
    x |= tape.linear(f"{name}.out", heads, width, unit, made, count=count)
    up = tape.linear(f"{name}.up", width, ffn, unit, x or tape.learns(f"{name}.ffn_norm.scale", f"{name}.ffn_norm.bias"), count=count)
    return tape.linear(f"{name}.down", ffn, width, unit, up, count=count, last=last) or x


def _policy(tape: _Tape, policy: PolicyConfig, bridge: bool) -> None:
    """What is beside and above the bridge: keys and values, state, and the denoising of each draw, the foreseen future too."""
    tape.component = "dit"
    config, body, own = policy.dit, policy.embodiment, "policy.embodiments"
    width, queries, pair = config.width, policy.bridge.queries, "policy.dit.pairs"
    sizes = _Sizes(width, width, config.ffn, "dit_tokens", 1)
    memory = (False, False)
    for _ in range(config.layers // 2):
        memory = _remember(tape, f"{pair}.cross.layer", policy.bridge.width, width, "moments", queries, bridge)
    state = tape.linear(f"{own}.state_inner", body.state_width, body.hidden, "moments", False)
    state = tape.linear(f"{own}.state_outer", body.hidden, width, "moments", state)
    times = 2 if policy.objective.prefix else 1  # a given step has a time of its own
    clock = tape.linear("policy.dit.time.inner", config.time_features, width, "draws", False, count=times)
    clock = tape.linear("policy.dit.time.outer", width, width, "draws", clock, count=times)
    actions = tape.linear(f"{own}.action_inner", body.patch * body.action_width, width, "action_tokens", False)
    actions = tape.linear(f"{own}.action_timed", 2 * width, width, "action_tokens", actions)
    actions = tape.linear(f"{own}.action_outer", width, width, "action_tokens", actions)

    def layers(x: bool) -> bool:
        made = tape.linear(f"{pair}.cross.modulate", width, 2 * width, "draws", clock, count=times)
        x = _attend(tape, f"{pair}.cross.layer", sizes, x, memory, "dit_tokens", queries, made)
        made = tape.linear(f"{pair}.own.modulate", width, 2 * width, "draws", clock, count=times)
        return _attend(tape, f"{pair}.own.layer", sizes, x, None, "dit_pairs", 1, made, last=True)

    x = state or actions or tape.learns("policy.future_tokens", "policy.action_places")
    tapped = x
    for number in range(1, config.layers // 2 + 1):
        x = tape.block(layers, x)
        tapped = x if 2 * number == config.tap else tapped
    made = tape.linear("policy.dit.modulate", width, 2 * width, "draws", clock, count=times)
    x = tape.linear(f"{own}.decode_inner", width, body.hidden, "action_tokens", x or made)
    tape.linear(f"{own}.decode_outer", body.hidden, body.patch * body.action_width, "action_tokens", x)
    head = "policy.future_head"
    tapped |= tape.learns(f"{head}.norm.scale", f"{head}.norm.bias")
    tapped = tape.linear(f"{head}.inner", width, policy.bridge.width, "future_draws", tapped, count=queries)
    tape.linear(f"{head}.outer", policy.bridge.width, policy.bridge.width, "future_draws", tapped, count=queries)
