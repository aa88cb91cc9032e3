"""The small base learns to find: each name in a text looks at what it names, says what its eyes say of that, and compares it with what was
named before.

All questions about things, and all tasks that name one, need this first. Sentences alone teach it slowly: that a name is to look for a
thing shows only in the words that follow it, if any. Here each name says for itself where the thing is, and its look is told where to go,
so that the first blocks of the decoder learn in minutes what takes hours otherwise. Each camera has a head that looks into its picture: a
head that looks into both would mix what they say, and only both together tell a place. Eyes and words stay as they are.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
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
from blm_jax.data.vision.pixels import cut_patches, levels_of
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.talk import eyes
from blm_jax.evaluate.world.talk.eyes import NUMBERS, REACH, Spoken
from blm_jax.evaluate.world.talk.fitting import Log, fitted, label_loss, mean_where
from blm_jax.evaluate.world.talk.questions import CLEARLY_LEFT, CLEARLY_NEARER, MARKS
from blm_jax.evaluate.world.talk.stills import FORK, NOUNS, Still, Thing, stills
from blm_jax.evaluate.world.talk.wordings import WORDINGS
from blm_jax.evaluate.world.view import CAMERAS, SIZE
from blm_jax.models.decoder import Decoder
from blm_jax.models.layers import around, unstack
from blm_jax.models.rope import text_rotary
from blm_jax.models.vision import VisionTower

LOOKS, COMPARES = 1, 2  # blocks that look at what is named, and that compare it with what was named before; the first binds a colour
LOOKING, BACK = (2, 3), 0  # the heads that look at things, one a camera, and that which looks back
SCENES, ROWS, EPOCHS, COMPARING = 12_000, 32, 5, 1  # epochs of looking, and of comparing
LENGTH, NAMES = 80, 20  # tokens of a text, and names in it, at most
COUNTED = 6  # things of a kind, at most
ABOUT_NAMES = tuple(kind for kind in WORDINGS if kind not in ("goal", "tip", "count", "colour", "shape", "robot", "success"))
RELATIONS = 3  # whether a thing is further left than the one before, in front of it, and in the fork
WORLD, TURN = 3, 2  # numbers of a place and of how a cube is turned
EXACT = 5  # how much more places count than all else: a policy lives on them
BETWEEN = (" ", "\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n")

_COLOURS, _NOUNS = "|".join(tasks.COLOURS), "|".join(NOUNS)
_MARKS = "|".join(mark.removeprefix("the ") for mark in MARKS)
NAME = re.compile(rf"\b(?:(?P<colour>{_COLOURS}) )?(?:(?P<noun>{_NOUNS}|thing)(?P<many>s?)|(?P<mark>{_MARKS})|(?P<tip>{FORK}))\b")


class Named(NamedTuple):
    """What texts name, [rows, NAMES, ...] each; what is not there has weight 0."""

    token: np.ndarray  # the last one of the name
    one: np.ndarray  # float32, 1 where it is a thing or a mark
    looks: np.ndarray  # [..., cameras, tokens of its picture] float32, 1 where it is shown, or zeros
    colour: np.ndarray  # int32, -1 where there is none
    noun: np.ndarray
    place: np.ndarray  # [..., WORLD] in the world, in REACH
    turn: np.ndarray  # [..., TURN]
    numbers: np.ndarray  # [..., NUMBERS]
    count: np.ndarray  # int32 of things of a kind, -1 where it is not that
    before: np.ndarray  # the token of the name that it is compared with, -1 where there is none
    more: np.ndarray  # [..., RELATIONS] int32, -1 where it is not clear


class Told(NamedTuple):
    """Scenes as eyes see them, and the texts about them."""

    seen: np.ndarray  # [rows, visual tokens, width] float16
    tokens: np.ndarray  # [rows, LENGTH]
    named: Named


def learn(
    params: dict[str, Any], config: BackboneConfig, engine: PromptEngine, spoken: Spoken, seed: int
) -> tuple[dict[str, Any], dict[str, Log]]:
    """A model's parameters after it, of which the decoder's first blocks are others, and the losses on the way."""
    told = _gathered(params, config, engine, seed)
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    begun = engine.encode([user_turn("", images=[blank] * len(CAMERAS))])
    ends = int(np.flatnonzero(begun.tokens == config.tokens.vision_end)[-1]) + 1
    start = begun.tokens[:ends], begun.positions[:, :ends]

    width = config.decoder.width
    fixed = {name: part for name, part in params["decoder"].items() if name != "blocks"}

    def batch(draw: np.random.Generator) -> Told:
        rows = draw.choice(len(told.tokens), ROWS, replace=False)
        return jax.tree.map(lambda part: part[rows], told)

    def learned(loss: Any, blocks: Any, first: int, sizes: dict[str, int], epochs: int, what: str) -> tuple[Any, Log]:
        """`blocks` of which one part, from the `first` on, has become good at it."""
        before, own, after = _cut(blocks, 0, first), _cut(blocks, first, loss.keywords["last"] + 1), _cut(blocks, loss.keywords["last"] + 1)
        heads = {name: {"kernel": jnp.zeros((width, size)), "bias": jnp.zeros(size)} for name, size in sizes.items()}
        others = {"decoder": fixed, "before": before, "after": after}
        state, log = fitted(loss, {"blocks": own, "heads": heads}, others, batch, epochs * SCENES // ROWS, seed, what)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), before, state["blocks"], after), log

    known = {"config": config, "start": start}
    sizes = {"measured": WORLD + TURN, **dict.fromkeys(("colour", "noun", *NUMBERS), width)}
    blocks, log = learned(partial(_finds, last=LOOKS, spoken=spoken, **known), params["decoder"]["blocks"], 0, sizes, EPOCHS, "finding")
    sizes = {"count": COUNTED + 1, "more": RELATIONS}
    blocks, more = learned(partial(_compares, last=COMPARES, **known), blocks, COMPARES, sizes, COMPARING, "comparing")
    return {**params, "decoder": {**params["decoder"], "blocks": blocks}}, {"finding": log, "comparing": more}


def _cut(blocks: dict[str, Any], first: int, end: int | None = None) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[first:end], blocks)


class _Read(NamedTuple):
    """What names hold after a block, and where they look in it."""

    held: jax.Array  # [rows, names, width], of one size
    looks: Callable[[int, Any], jax.Array]  # of a head, at some tokens: log [rows, names, tokens]


def _read(state: Any, fixed: Any, told: Told, last: int, config: BackboneConfig, start: tuple[np.ndarray, np.ndarray]) -> _Read:
    """All tokens up to the `last` block, and in that the names alone, as nothing comes after it."""
    blocks = jax.tree.map(lambda *parts: jnp.concatenate(parts), fixed["before"], state["blocks"], fixed["after"])
    model = around(lambda: Decoder(config.decoder, ComputeConfig(), rngs=nnx.Rngs(0)), {**fixed["decoder"], "blocks": blocks})
    rows, (begun, places) = len(told.tokens), start
    tokens = jnp.concatenate([jnp.broadcast_to(begun, (rows, len(begun))), told.tokens], axis=1)
    own = places.max() + 1 + np.broadcast_to(np.arange(LENGTH), (3, LENGTH))
    positions = jnp.broadcast_to(np.concatenate([places, own], axis=1), (rows, 3, tokens.shape[1]))
    visual = np.flatnonzero(begun == config.tokens.image)
    x = model.embed(tokens).at[:, visual].set(told.seen.astype(jnp.float32))
    rotary, segments = text_rotary(positions, config.decoder), jnp.ones(tokens.shape, jnp.int32)
    *first, block = unstack(model.blocks)[: last + 1]
    for earlier in first:
        x, _ = earlier(x, rotary, segments)
    q, k, v = block.project(x, rotary)
    at = len(begun) + told.named.token
    x, q = jnp.take_along_axis(x, at[..., None], axis=1), jnp.take_along_axis(q, at[..., None, None], axis=1)
    scores = jnp.einsum("rnhd,rshd->rnhs", q, k) * q.shape[-1] ** -0.5
    scores = jax.nn.log_softmax(jnp.where(jnp.arange(tokens.shape[1]) <= at[..., None, None], scores, -jnp.inf), axis=-1)
    x = block.finish(x, jnp.einsum("rnhs,rshd->rnhd", jnp.exp(scores), v))
    held = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.decoder.norm_eps)
    return _Read(held, lambda head, some: scores[:, :, head][..., some])


def _finds(
    state: Any, fixed: Any, told: Told, *, last: int, config: BackboneConfig, start: tuple[np.ndarray, np.ndarray], spoken: Spoken
) -> tuple[jax.Array, dict[str, jax.Array]]:
    read, named, words = _read(state, fixed, told, last, config, start), told.named, fixed["decoder"]["embed"]["embedding"]
    said = {name: read.held @ head["kernel"] + head["bias"] for name, head in state["heads"].items()}
    place, turn = jnp.split(said["measured"], [WORLD], axis=-1)

    def in_words(name: str, choices: np.ndarray, meant: Any) -> jax.Array:
        return label_loss(named.one, said[name] @ words[choices].T, meant)

    of_camera = np.flatnonzero(start[0] == config.tokens.image).reshape(len(LOOKING), -1)
    scores = jnp.stack([read.looks(head, some) for head, some in zip(LOOKING, of_camera, strict=True)], axis=2)
    numbers = zip(NUMBERS, spoken.of_numbers(), strict=True)
    off = jnp.abs(place - named.place)
    hit = jnp.take_along_axis(named.looks, jnp.argmax(scores, axis=-1)[..., None], axis=-1)[..., 0] > 0
    shown = named.looks.sum(axis=-1)
    parts = {
        "looks": -mean_where(shown, jnp.sum(jnp.where(named.looks > 0, scores, 0), axis=-1)),
        "colour": in_words("colour", spoken.colours[1], named.colour),
        "noun": in_words("noun", spoken.nouns[1], named.noun),
        "numbers": jnp.mean(jnp.stack([in_words(name, choices, named.numbers[..., i]) for i, (name, choices) in enumerate(numbers)])),
        "place": EXACT * mean_where(named.one, jnp.sum(off, axis=-1)),
        "turn": mean_where(jnp.any(named.turn != 0, axis=-1), jnp.mean(jnp.abs(turn - named.turn), axis=-1)),
    }
    losses = {**parts, "off_cm": 100 * REACH * mean_where(named.one, jnp.mean(off, axis=-1)), "hit": mean_where(shown, hit)}
    return sum(parts.values(), jnp.float32(0)), losses


def _compares(
    state: Any, fixed: Any, told: Told, *, last: int, config: BackboneConfig, start: tuple[np.ndarray, np.ndarray]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    read, named = _read(state, fixed, told, last, config, start), told.named
    said = {name: read.held @ head["kernel"] + head["bias"] for name, head in state["heads"].items()}
    before = len(start[0]) + jnp.maximum(named.before, 0)
    back = jnp.take_along_axis(read.looks(BACK, slice(None)), before[..., None], axis=-1)[..., 0]
    parts = {
        "count": label_loss(jnp.ones_like(named.one), said["count"], named.count),
        "back": -mean_where(named.before >= 0, back),
        "more": RELATIONS * mean_where(named.more >= 0, optax.sigmoid_binary_cross_entropy(said["more"], jnp.maximum(named.more, 0))),
    }
    return sum(parts.values(), jnp.float32(0)), parts


# --- scenes and texts ----------------------------------------------------------------------------------------------------


def _gathered(params: dict[str, Any], config: BackboneConfig, engine: PromptEngine, seed: int) -> Told:
    tower = jax.jit(partial(_tokens, config=config, levels=levels_of(engine.pixels)))
    side = SIZE // (engine.pixels.merge * engine.pixels.patch)
    scenes, draw, parts = stills(seed + 1, "train", robots=False), random.Random(f"{seed} finding"), []
    for _ in tqdm(range(SCENES // ROWS), unit=f" x {ROWS} scenes", desc="scenes", disable=None):
        some = [next(scenes) for _ in range(ROWS)]
        patches = np.stack([cut_patches(picture[None], engine.pixels) for still in some for picture in still.pictures])
        seen = np.asarray(tower(params["vision"], patches)).astype(np.float16)
        told = [_told(still, draw, engine, side) for still in some]
        tokens, named = (jax.tree.map(lambda *rows: np.stack(rows), *column) for column in zip(*told, strict=True))
        parts.append(Told(seen.reshape(ROWS, -1, seen.shape[-1]), tokens, named))
    return jax.tree.map(lambda *some: np.concatenate(some), *parts)


def _tokens(vision: Any, patches: jax.Array, *, config: BackboneConfig, levels: Any) -> jax.Array:
    tower = around(lambda: VisionTower(config.vision, ComputeConfig(), rngs=nnx.Rngs(0)), vision)
    return tower(eyes.rows_of(jnp.asarray(patches), levels, config.vision.merge))


def _told(still: Still, draw: random.Random, engine: PromptEngine, side: int) -> tuple[np.ndarray, Named]:
    text = "\n" + _text(still, draw)
    made = engine.tokenizer.backend.encode(text, add_special_tokens=False)
    tokens = np.full(LENGTH, engine.config.tokens.pad, np.int32)
    tokens[: len(made.ids)] = made.ids[:LENGTH]
    of_char = {end: i for i, (_, end) in enumerate(made.offsets)}
    owned = np.stack([eyes.owners(still, number, side) for number in range(len(CAMERAS))])
    names = Named(
        token=np.zeros(NAMES, np.int32),
        one=np.zeros(NAMES, np.float32),
        looks=np.zeros((NAMES, *owned.shape), np.float32),
        colour=np.full(NAMES, -1, np.int32),
        noun=np.zeros(NAMES, np.int32),
        place=np.zeros((NAMES, WORLD), np.float32),
        turn=np.zeros((NAMES, TURN), np.float32),
        numbers=np.zeros((NAMES, len(NUMBERS)), np.int32),
        count=np.full(NAMES, -1, np.int32),
        before=np.full(NAMES, -1, np.int32),
        more=np.full((NAMES, RELATIONS), -1, np.int32),
    )
    last = None  # thing that was named, and its token
    found = [(of_char[match.end()], match) for match in NAME.finditer(text) if match.end() in of_char]
    for i, (token, match) in enumerate([pair for pair in found if pair[0] < LENGTH][:NAMES]):
        names.token[i] = token
        meant = meant_by(still, match)
        if match["many"]:
            names.count[i] = min(len(meant), COUNTED)
        elif len(meant) == 1:
            number = meant[0]
            facts = eyes.facts(still, number)
            names.one[i], names.colour[i], names.noun[i] = 1, facts.colour, facts.noun
            names.place[i], names.turn[i], names.numbers[i] = facts.position / REACH, facts.turn, facts.numbers
            names.looks[i] = owned == number
            if number < len(still.things):
                if last is not None and last[0] != number:
                    names.before[i], names.more[i, :2] = last[1], _leads(still.things[number], still.things[last[0]])
                if still.tip is not None:
                    names.more[i, 2] = still.around == number
                last = number, token
    return tokens, names


def _leads(thing: Thing, other: Thing) -> list[int]:
    """Whether it is further left, and whether it is in front of the other one."""
    leads = ((other.place[0] - thing.place[0], CLEARLY_LEFT), (thing.position[0] - other.position[0], CLEARLY_NEARER))
    return [int(lead > 0) if abs(lead) >= clearly else -1 for lead, clearly in leads]


def meant_by(still: Still, match: re.Match[str]) -> list[int]:
    """All that a name may mean, as `eyes.shown` counts."""
    if match["mark"] or match["tip"]:
        wanted = eyes.MARK if match["mark"] else eyes.TIP
        return [i for i, (_, noun) in enumerate(eyes.shown(still)) if noun == wanted]
    colour, noun = match["colour"], match["noun"]
    return [i for i, thing in enumerate(still.things) if colour in (None, thing.colour) and noun in ("thing", thing.noun)]


def _text(still: Still, draw: random.Random) -> str:
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
