"""The small base learns to find: each name in a text looks at what it names, says what its eyes say of that, and compares it with what was
named before.

All questions about things, and all tasks that name one, need this first. Sentences alone teach it slowly: that a name is to look for a
thing shows only in the words that follow it, if any. Here each name says for itself where the thing is, and its look is told where to go,
so that the first blocks of the decoder learn in minutes what takes hours otherwise. Each camera has a head that looks into its picture: a
head that looks into both would mix what they say, and only both together tell a place. Eyes and words stay as they are.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from blm_jax.config import BackboneConfig, ComputeConfig
from blm_jax.data.prompt import PromptEngine, user_turn
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.talk import eyes
from blm_jax.evaluate.world.talk.eyes import NUMBERS, REACH, Spoken
from blm_jax.evaluate.world.talk.fitting import Log, fitted, label_loss, mean_where
from blm_jax.evaluate.world.talk.naming import COUNTED, RELATIONS, TURN, WORLD, Named, named, spelled
from blm_jax.evaluate.world.talk.questions import MARKS
from blm_jax.evaluate.world.talk.recipe import Part
from blm_jax.evaluate.world.talk.stills import FORK, Still, stills
from blm_jax.evaluate.world.talk.wordings import WORDINGS
from blm_jax.evaluate.world.view import CAMERAS, SIZE
from blm_jax.models.decoder import Decoder, DecoderBlock
from blm_jax.models.layers import around, unstack
from blm_jax.models.rope import Rotary, text_rotary

LOOKS, COMPARES = 1, 2  # blocks that look at what is named, and that compare it with what was named before; the first binds a colour
LOOKING, BACK = (2, 3), 0  # the heads that look at things, one a camera, and that which looks back
LENGTH, NAMES = 80, 20  # tokens of a text, and names in it, at most
ABOUT_NAMES = tuple(kind for kind in WORDINGS if kind not in ("goal", "tip", "count", "colour", "shape", "robot", "success"))
EXACT = 5  # how much more places count than all else: a policy lives on them
TOGETHER = 32  # scenes that eyes look at together
BETWEEN = (" ", "\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n")

Heads = dict[str, dict[str, jax.Array]]


class Told(NamedTuple):
    """Scenes as eyes see them, and the texts about them."""

    seen: np.ndarray  # [rows, visual tokens, width] float16
    tokens: np.ndarray  # [rows, LENGTH]
    named: Named


class Start(NamedTuple):
    """What comes before any text: the pictures, and what stands around them."""

    tokens: np.ndarray  # [tokens]
    positions: np.ndarray  # [3, tokens]
    visual: np.ndarray  # [cameras, tokens of a picture] which tokens those are

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def ahead(self) -> int:
        """The position of what comes next."""
        return int(self.positions.max()) + 1


def start_of(engine: PromptEngine) -> Start:
    blank, ids = np.zeros((SIZE, SIZE, 3), np.uint8), engine.config.tokens
    begun = engine.encode([user_turn("", images=[blank] * len(CAMERAS))])
    end = int(np.flatnonzero(begun.tokens == ids.vision_end)[-1]) + 1
    tokens = begun.tokens[:end]
    return Start(tokens, begun.positions[:, :end], np.flatnonzero(tokens == ids.image).reshape(len(CAMERAS), -1))


def new_heads(width: int) -> Heads:
    """Layers through which names say what they hold."""
    sizes = {"measured": WORLD + TURN, **dict.fromkeys(("colour", "noun", *NUMBERS), width), "count": COUNTED + 1, "more": RELATIONS}
    return {name: {"kernel": jnp.zeros((width, size)), "bias": jnp.zeros(size)} for name, size in sizes.items()}


def learn(
    params: dict[str, Any], config: BackboneConfig, engine: PromptEngine, spoken: Spoken, part: Part, seed: int
) -> tuple[dict[str, Any], Heads, Log]:
    """A model's parameters after it, of which the decoder's first blocks are others, the layers that say what names hold, and losses on the
    way."""
    told, start = _gathered(params, config, engine, part, seed), start_of(engine)
    blocks = params["decoder"]["blocks"]
    first, later = (jax.tree.map(lambda leaf, cut=cut: leaf[cut], blocks) for cut in (slice(LOOKS + 1), slice(LOOKS + 1, None)))
    fixed = {name: one for name, one in params["decoder"].items() if name != "blocks"}

    def batch(draw: np.random.Generator) -> Told:
        rows = draw.choice(len(told.tokens), part.batch, replace=False)
        return jax.tree.map(lambda leaf: leaf[rows], told)

    loss = partial(_loss, config=config, start=start, spoken=spoken)
    state, log = fitted(loss, {"blocks": first, "heads": new_heads(config.decoder.width)}, fixed, batch, part, seed, "finding")
    blocks = jax.tree.map(lambda *parts: jnp.concatenate(parts), state["blocks"], later)
    return {**params, "decoder": {**params["decoder"], "blocks": blocks}}, state["heads"], log


class Read(NamedTuple):
    """What names hold after a block, and where they look in it."""

    held: jax.Array  # [rows, names, width], of one size
    looks: Callable[[int, Any], jax.Array]  # of a head, at some tokens: log [rows, names, tokens]


def at_names(block: DecoderBlock, x: jax.Array, projected: tuple[jax.Array, ...], at: jax.Array, norm_eps: float) -> Read:
    """Of tokens x [rows, tokens, width] and what a block projects them to: what the names at `at` [rows, names] make of it, alone."""
    q, k, v = projected
    x, q = jnp.take_along_axis(x, at[..., None], axis=1), jnp.take_along_axis(q, at[..., None, None], axis=1)
    scores = jnp.einsum("rnhd,rshd->rnhs", q, k) * q.shape[-1] ** -0.5
    scores = jax.nn.log_softmax(jnp.where(jnp.arange(k.shape[1]) <= at[..., None, None], scores, -jnp.inf), axis=-1)
    x = block.finish(x, jnp.einsum("rnhs,rshd->rnhd", jnp.exp(scores), v))
    held = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + norm_eps)
    return Read(held, lambda head, some: scores[:, :, head][..., some])


def _loss(
    state: Any, fixed: Any, told: Told, *, config: BackboneConfig, start: Start, spoken: Spoken
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """All tokens up to the block that looks, and in that the names alone, as nothing comes after it."""
    first = replace(config.decoder, layers=LOOKS + 1)
    model = around(lambda: Decoder(first, ComputeConfig(), rngs=nnx.Rngs(0)), {**fixed, "blocks": state["blocks"]})
    x, rotary = begun(model, told.seen, told.tokens, start, config)
    segments = jnp.ones(x.shape[:2], jnp.int32)
    *before, block = unstack(model.blocks)
    for earlier in before:
        x, _ = earlier(x, rotary, segments)
    found = at_names(block, x, block.project(x, rotary), start.length + jnp.asarray(told.named.token), config.decoder.norm_eps)
    return finds(found, told.named, state["heads"], fixed["embed"]["embedding"], start, spoken)


def begun(model: Decoder, seen: Any, tokens: Any, start: Start, config: BackboneConfig, first: Any = None) -> tuple[jax.Array, Rotary]:
    """Embeddings of pictures and texts, and where they are: texts behind the pictures, or from positions `first` [rows] on."""
    rows, length = tokens.shape
    whole = jnp.concatenate([jnp.broadcast_to(start.tokens, (rows, start.length)), tokens], axis=1)
    first = jnp.full(rows, start.ahead) if first is None else first
    own = jnp.broadcast_to(first[:, None, None] + jnp.arange(length), (rows, 3, length))
    positions = jnp.concatenate([jnp.broadcast_to(start.positions, (rows, *start.positions.shape)), own], axis=2)
    x = model.embed(whole).at[:, start.visual.ravel()].set(seen.astype(jnp.float32))
    return x, text_rotary(positions, config.decoder)


def finds(read: Read, named: Named, heads: Heads, words: jax.Array, start: Start, spoken: Spoken) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether names looked at what they name, and say what is true of it."""
    said = {name: read.held @ heads[name]["kernel"] + heads[name]["bias"] for name in ("measured", "colour", "noun", *NUMBERS)}
    place, turn = jnp.split(said["measured"], [WORLD], axis=-1)

    def in_words(name: str, choices: np.ndarray, meant: Any) -> jax.Array:
        return label_loss(named.one, said[name] @ words[choices].T, meant)

    scores = jnp.stack([read.looks(head, some) for head, some in zip(LOOKING, start.visual, strict=True)], axis=2)
    at, shown = jnp.maximum(named.looks, 0), jnp.asarray(named.looks >= 0, jnp.float32)
    numbers = zip(NUMBERS, spoken.of_numbers(), strict=True)
    off = jnp.abs(place - named.place)
    parts = {
        "looks": -mean_where(shown, jnp.take_along_axis(scores, at[..., None], axis=-1)[..., 0]),
        "colour": in_words("colour", spoken.colours[1], named.colour),
        "noun": in_words("noun", spoken.nouns[1], named.noun),
        "numbers": jnp.mean(jnp.stack([in_words(name, choices, named.numbers[..., i]) for i, (name, choices) in enumerate(numbers)])),
        "place": EXACT * mean_where(named.one, jnp.sum(off, axis=-1)),
        "turn": mean_where(jnp.any(named.turn != 0, axis=-1), jnp.mean(jnp.abs(turn - named.turn), axis=-1)),
    }
    hit = mean_where(shown, jnp.argmax(scores, axis=-1) == at)
    return sum(parts.values(), jnp.float32(0)), {**parts, "off_cm": 100 * REACH * mean_where(named.one, jnp.mean(off, axis=-1)), "hit": hit}


def compares(read: Read, named: Named, heads: Heads, start: Start) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether names looked back, and say what of them and of the name before is true."""
    said = {name: read.held @ heads[name]["kernel"] + heads[name]["bias"] for name in ("count", "more")}
    before = start.length + jnp.maximum(named.before, 0)
    back = jnp.take_along_axis(read.looks(BACK, slice(None)), before[..., None], axis=-1)[..., 0]
    parts = {
        "count": label_loss(jnp.ones_like(named.one), said["count"], named.count),
        "back": -mean_where(named.before >= 0, back),
        "more": RELATIONS * mean_where(named.more >= 0, optax.sigmoid_binary_cross_entropy(said["more"], jnp.maximum(named.more, 0))),
    }
    return sum(parts.values(), jnp.float32(0)), parts


# --- scenes and texts ----------------------------------------------------------------------------------------------------


def _gathered(params: dict[str, Any], config: BackboneConfig, engine: PromptEngine, part: Part, seed: int) -> Told:
    draw, spelling, rows = random.Random(f"{seed} finding"), spelled(engine.tokenizer.backend), []
    for still, seen in scenes(params, config, engine, part.scenes, seed + 1, "scenes"):
        text = "\n" + text_about(still, draw)
        ids = engine.tokenizer.backend.encode(text, add_special_tokens=False).ids[:LENGTH]
        tokens = np.full(LENGTH, config.tokens.pad, np.int32)
        tokens[: len(ids)] = ids
        rows.append(Told(seen, tokens, named(still, ids, spelling, side_of(engine), NAMES)))
    return jax.tree.map(lambda *some: np.stack(some), *rows)


def side_of(engine: PromptEngine) -> int:
    """Tokens along a picture."""
    return SIZE // (engine.pixels.merge * engine.pixels.patch)


def scenes(
    params: dict[str, Any], config: BackboneConfig, engine: PromptEngine, count: int, seed: int, what: str
) -> Iterator[tuple[Still, np.ndarray]]:
    """So many scenes, and what eyes make of each: [visual tokens, width] float16."""
    look, found = eyes.looker(config, engine.pixels), stills(seed, "train", robots=False)
    with tqdm(total=count, unit=" scenes", desc=what, disable=None) as bar:
        for begin in range(0, count, TOGETHER):
            some = [next(found) for _ in range(min(TOGETHER, count - begin))]
            yield from zip(some, look(params["vision"], np.stack([still.pictures for still in some])), strict=True)
            bar.update(len(some))


def text_about(still: Still, draw: random.Random) -> str:
    """Questions, tasks and lists, one after the other."""
    said, length = [], 0
    while length < 6 * LENGTH:  # letters: more than fit
        piece = draw.choices((_list, _task, _of_mark, _of_many, _of_one_word, _of_names), (15, 20, 15, 10, 10, 30))[0](still, draw)
        said += [piece, draw.choice(BETWEEN)] * bool(piece)
        length += len(piece)
    return "".join(said)


def _list(still: Still, draw: random.Random) -> str:
    return ", ".join(f"{thing.colour} {thing.noun}" for thing in draw.sample(still.things, len(still.things)))


def _task(still: Still, draw: random.Random) -> str:
    colours = [thing.colour for thing in still.things]
    return draw.choice(draw.choice(tasks.WORDINGS)).format(draw.choice(colours), draw.choice(colours))


def _of_mark(still: Still, draw: random.Random) -> str:
    marks = [*(MARKS if still.goal is not None else ()), *([f"the {FORK}"] * 2 if still.tip is not None else ())]
    return draw.choice(WORDINGS["goal"][0]).format(draw.choice(marks)) if marks else ""


def _of_many(still: Still, draw: random.Random) -> str:
    many = [f"{thing.colour} things" for thing in still.things] + [f"{thing.noun}s" for thing in still.things] + ["things"]
    return draw.choice(WORDINGS["count"][0]).format(draw.choice(many))


def _of_one_word(still: Still, draw: random.Random) -> str:
    colours, nouns = Counter(thing.colour for thing in still.things), Counter(thing.noun for thing in still.things)
    names = [("shape", f"the {colour} thing") for colour, count in colours.items() if count == 1]
    names += [("colour", f"the {noun}") for noun, count in nouns.items() if count == 1]
    if not names:
        return ""
    kind, name = draw.choice(names)
    return draw.choice(WORDINGS[kind][0]).format(name)


def _of_names(still: Still, draw: random.Random) -> str:
    counts = Counter((thing.colour, thing.noun) for thing in still.things)
    named = [f"the {colour} {noun}" for (colour, noun), count in counts.items() if count == 1]
    if not named:
        return ""
    names = draw.sample(named, min(2, len(named)))
    return draw.choice(WORDINGS[draw.choice(ABOUT_NAMES)][0]).format(names[0], names[-1])
