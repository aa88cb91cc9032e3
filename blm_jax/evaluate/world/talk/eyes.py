"""The small base's eyes, before it has words: its vision tower learns what each cell of a picture shows, and where.

Words alone teach a tower this small to see, but slowly: of a sentence, few tokens depend on the picture. Here each visual token says for
itself which thing has its middle there, if any, and where that is. What it shows points where the model's own words point, so that a red
cube looks as "red" and "cube" read, and any thing as the picture's own word. Where it is is said in measures and in words for numbers, so
that those which are close become words that are close; the layers for this are thrown away.

A mark is apart from things: what is brought to one comes to lie in the same cell, and then neither may hide the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from blm_jax.batch import VisionRows
from blm_jax.config import BackboneConfig, ComputeConfig
from blm_jax.data.vision.pixels import PixelConfig, cut_patches, levels_of
from blm_jax.evaluate.world import render
from blm_jax.evaluate.world.scene import BODIES
from blm_jax.evaluate.world.talk.fitting import Log, fitted, label_loss, mean_where
from blm_jax.evaluate.world.talk.questions import GRID
from blm_jax.evaluate.world.talk.recipe import Part
from blm_jax.evaluate.world.talk.stills import LOOSE, NOUNS, SEEN, Still, stills
from blm_jax.evaluate.world.tasks import COLOURS
from blm_jax.evaluate.world.view import CAMERAS, SIZE
from blm_jax.models.layers import around
from blm_jax.models.vision import VisionTower

REACH = 0.25  # metres that x and y are divided by
PLACE, EXACT = 5, 10  # a thing's places in picture and world; how much more the first count, which one picture tells
MOST = BODIES + LOOSE + 1  # things in cells of a picture, with a fork
FARTHEST = 35  # centimetres along x, y and z that there are words for
MARK, TIP = len(NOUNS), len(NOUNS) + 1  # what counts as nouns beside those of things: a mark, and what a fork holds between its tips
PALM = np.array([0, 0, 0.06])  # where a fork is seen, from its tips: there may be a thing between those
NUMBERS = ("column", "row", "x", "y", "z")  # what is said in words for numbers, each through a layer of its own


class Spoken(NamedTuple):
    """Tokens of words, by what they mean."""

    colours: np.ndarray  # [2, colours] as the first word of an answer, and behind another
    nouns: np.ndarray  # [2, nouns + 2], the last ones a mark's and a fork's
    columns: np.ndarray  # [GRID]
    rows: np.ndarray  # [GRID]
    centimetres: np.ndarray  # [2 * FARTHEST + 1] from -FARTHEST on

    def of_numbers(self) -> tuple[np.ndarray, ...]:
        """By NUMBERS."""
        return self.columns, self.rows, self.centimetres, self.centimetres, self.centimetres


class Meant(NamedTuple):
    """What is true of the things in the cells of pictures, [pictures, cells] each."""

    colour: Any  # -1 where there is none
    noun: Any
    place: Any  # [pictures, cells, PLACE] in the picture, from -1 to 1, and in the world, in REACH
    turn: Any  # [pictures, cells, 2] cosine and sine of a cube's, four times; zeros for all else
    numbers: Any  # [pictures, cells, NUMBERS] words for its column and row, in the first picture, and its x, y and z


class Mark(NamedTuple):
    """What is true of the one that a picture shows."""

    cell: Any  # [pictures] int32, -1 where there is none
    place: Any  # [pictures, PLACE]
    numbers: Any  # [pictures, NUMBERS]


class Seen(NamedTuple):
    pictures: np.ndarray  # [pictures, size, size, 3] uint8; where they are learned from, patches [pictures, patches, values]
    there: np.ndarray  # [pictures, cells] bool: the middle of a thing, or a fork's tips
    meant: Meant
    mark: Mark


def learn(
    params: dict[str, Any], config: BackboneConfig, pixels: PixelConfig, spoken: Spoken, part: Part, seed: int
) -> tuple[dict[str, Any], Log]:
    """A model's parameters after it, of which the tower's and the words' are others, and the losses on the way."""
    seen = _gathered(islice(stills(seed, "train", robots=False), part.scenes), part.scenes, SIZE // (pixels.merge * pixels.patch))
    cells = seen.there.shape[1]
    side = round(cells**0.5)
    own = np.stack(np.meshgrid(*2 * [(np.arange(side) + 0.5) * 2 / side - 1], indexing="ij"), axis=-1).reshape(cells, 2).astype(np.float32)
    views, width = len(CAMERAS), config.vision.out_width
    sizes = {"measured": PLACE + 2, "mark": PLACE, "own": 2} | dict.fromkeys((*NUMBERS, *map(_of_mark, NUMBERS)), width)
    heads: dict[str, Any] = {name: {"kernel": jnp.zeros((width, size)), "bias": jnp.zeros(size)} for name, size in sizes.items()}
    heads["there"] = {"bias": jnp.zeros(())}
    heads["marked"] = {"bias": jnp.zeros(())}
    state = {"tower": params["vision"], "words": params["decoder"]["embed"]["embedding"], "heads": heads}
    loss = partial(_loss, config=config, levels=levels_of(pixels), spoken=spoken, own=own)

    def batch(draw: np.random.Generator) -> Seen:
        scenes = draw.choice(part.scenes, part.batch, replace=False)
        rows = (scenes[:, None] * views + np.arange(views)).ravel()
        some = jax.tree.map(lambda part: part[rows], seen)
        return some._replace(pictures=np.stack([cut_patches(picture[None], pixels) for picture in some.pictures]))

    state, log = fitted(loss, state, None, batch, part, seed, "eyes")
    decoder = {**params["decoder"], "embed": {"embedding": state["words"]}}
    return {**params, "vision": state["tower"], "decoder": decoder}, log


def _gathered(scenes: Iterator[Still], count: int, side: int) -> Seen:
    """`side` cells along either side of a picture."""
    parts = []
    for still in tqdm(scenes, total=count, unit=" scenes", desc="scenes", disable=None):
        parts += [cells_of(still, number, side) for number in range(len(CAMERAS))]
    return jax.tree.map(lambda *some: np.stack(some), *parts)


def _of_mark(name: str) -> str:
    """A mark's own layer for a number."""
    return f"mark's {name}"


def cells_of(still: Still, number: int, side: int) -> Seen:
    """What is to be learned of a camera's picture, of side * side cells."""
    there, count = np.zeros(side * side, bool), len(shown(still))
    owner, mark_cell = owners(still, number, side), marked(still, number, side)
    colour, noun = (np.full(side * side, number, np.int32) for number in (-1, 0))
    place, turn = np.zeros((side * side, PLACE), np.float32), np.zeros((side * side, 2), np.float32)
    numbers = np.zeros((side * side, len(NUMBERS)), np.int32)
    all_of = [facts(still, number) for number in range(count)]
    found, _ = render.project(list(CAMERAS.values())[number], np.stack([each.position for each in all_of]), SIZE)
    places = np.concatenate([2 * found / SIZE - 1, np.stack([each.position for each in all_of]) / REACH], axis=1, dtype=np.float32)
    for cell in np.flatnonzero(owner >= 0):
        each = all_of[owner[cell]]
        there[cell], colour[cell], noun[cell], turn[cell], numbers[cell] = True, each.colour, each.noun, each.turn, each.numbers
        place[cell] = places[owner[cell]]
    mark = Mark(np.int32(-1), np.zeros(PLACE, np.float32), np.zeros(len(NUMBERS), np.int32))
    if mark_cell >= 0:
        which = [each.noun for each in all_of].index(MARK)
        mark = Mark(np.int32(mark_cell), places[which], all_of[which].numbers)
    return Seen(still.pictures[number], there, Meant(colour, noun, place, turn, numbers), mark)


class Facts(NamedTuple):
    """What is true of what `shown` counts, as it is learned."""

    position: np.ndarray  # [3]
    colour: int
    noun: int
    turn: tuple[float, float]
    numbers: np.ndarray  # [NUMBERS]


def shown(still: Still) -> list[tuple[np.ndarray, int]]:
    """Middles of all things, of the mark and of the fork if there are, and of which noun each is."""
    others = [(place, noun) for place, noun in ((still.goal, MARK), (still.tip, TIP)) if place is not None]
    return [(thing.position, NOUNS.index(thing.noun)) for thing in still.things] + others


def facts(still: Still, number: int) -> Facts:
    position, noun = shown(still)[number]
    position = np.asarray(position, np.float32)
    pointed, _ = render.project(CAMERAS["front"], position, SIZE)
    pointed = np.clip(GRID * pointed / SIZE, 0, GRID - 1)
    numbers = np.array([*pointed, *(np.clip(np.round(100 * position), -FARTHEST, FARTHEST) + FARTHEST)], np.int32)
    if noun in (MARK, TIP):
        return Facts(position, -1, noun, (0.0, 0.0), numbers)
    thing = still.things[number]
    turn = (0.0, 0.0) if thing.turn is None else (float(np.cos(4 * thing.turn)), float(np.sin(4 * thing.turn)))
    return Facts(position, COLOURS.index(thing.colour), noun, turn, numbers)


def owners(still: Still, number: int, side: int) -> np.ndarray:
    """Of each of side * side cells of a camera's picture, what is seen and has its middle there, as `shown` counts; -1 where nothing is, or
    a mark alone.
    """
    owner = np.full(side * side, -1)
    things, nouns = zip(*shown(still), strict=True)
    places = np.stack([place + PALM * (noun == TIP) for place, noun in zip(things, nouns, strict=True)])
    found, depth = render.project(list(CAMERAS.values())[number], places.astype(np.float32), SIZE)
    sizes = [0 if noun == MARK else SEEN if noun == TIP else still.sizes[number, i] for i, noun in enumerate(nouns)]
    seen = (np.array(sizes) >= SEEN) & _inside(found)
    for i in np.argsort(-depth):  # the nearest last: it hides the others
        if seen[i]:
            owner[_cell_at(found[i], side)] = i
    return owner


def marked(still: Still, number: int, side: int) -> int:
    """The cell of a camera's picture in which the mark is seen; -1 where it is not."""
    if still.goal is None or still.sizes[number, -1] < SEEN:
        return -1
    found, _ = render.project(list(CAMERAS.values())[number], np.asarray(still.goal, np.float32), SIZE)
    return _cell_at(found, side) if _inside(found) else -1


def _inside(found: np.ndarray) -> np.ndarray:
    return np.all((found >= 0) & (found < SIZE), axis=-1)


def _cell_at(found: np.ndarray, side: int) -> int:
    column, row = (int(step) for step in found / SIZE * side)
    return row * side + column


def _loss(
    state: Any, fixed: None, seen: Seen, *, config: BackboneConfig, levels: Any, spoken: Spoken, own: np.ndarray
) -> tuple[jax.Array, dict[str, jax.Array]]:
    tower = around(lambda: VisionTower(config.vision, ComputeConfig(), rngs=nnx.Rngs(0)), state["tower"])
    tokens = tower(rows_of(jnp.asarray(seen.pictures), levels, config.vision.merge))
    heads, words = state["heads"], state["words"]
    there, mark = jnp.asarray(seen.there, jnp.float32), jax.tree.map(jnp.asarray, seen.mark)
    marks = jax.nn.one_hot(mark.cell, there.shape[1])

    def shows(name: str, word: int, what: jax.Array) -> jax.Array:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(tokens @ words[word] + heads[name]["bias"], what))

    everywhere = {
        "there": shows("there", config.tokens.image, jnp.maximum(there, marks)),
        "marked": jnp.mean(jnp.stack([shows("marked", words_of[MARK], marks) for words_of in spoken.nouns])),
        "own": jnp.mean(jnp.abs(_layer(heads["own"], tokens) - own)),
    }

    there, cells = jax.lax.top_k(there, MOST)

    def of_things(part: Any) -> jax.Array:
        """Of the few cells that show the middle of anything: all else is asked of those alone."""
        part = jnp.asarray(part)
        return jnp.take_along_axis(part, cells.reshape(*cells.shape, *(1,) * (part.ndim - 2)), axis=1)

    at_mark = jnp.take_along_axis(tokens, jnp.maximum(mark.cell, 0)[:, None, None], axis=1)  # [pictures, 1, width]
    tokens, meant = of_things(tokens), Meant(*(of_things(part) for part in seen.meant))
    place, turn = jnp.split(_layer(heads["measured"], tokens), [PLACE], axis=-1)
    both = jnp.concatenate([there, mark.cell[:, None] >= 0], axis=1)  # things and then the mark, as all that is asked of either

    def joined(things: Any, mark: Any) -> jax.Array:
        return jnp.concatenate([things, mark], axis=1)

    def in_words(where: jax.Array, token: jax.Array, choices: np.ndarray, meant: jax.Array) -> jax.Array:
        return label_loss(where, token @ words[choices].T, meant)

    def in_numbers(i: int, choices: np.ndarray) -> jax.Array:
        said = joined(_layer(heads[NUMBERS[i]], tokens), _layer(heads[_of_mark(NUMBERS[i])], at_mark))
        return in_words(both, said, choices, joined(meant.numbers[..., i], mark.numbers[:, None, i]))

    off = jnp.abs(joined(place, _layer(heads["mark"], at_mark)) - joined(meant.place, mark.place[:, None]))
    in_picture, in_world = jnp.sum(off[..., :2], axis=-1), jnp.sum(off[..., 2:], axis=-1)
    nouns = np.delete(np.arange(len(NOUNS) + 2), MARK)
    noun = jnp.searchsorted(nouns, meant.noun)
    parts = everywhere | {
        "colour": jnp.mean(jnp.stack([in_words(there, tokens, choices, meant.colour) for choices in spoken.colours])),
        "noun": jnp.mean(jnp.stack([in_words(there, tokens, choices[nouns], noun) for choices in spoken.nouns])),
        "numbers": jnp.mean(jnp.stack([in_numbers(i, choices) for i, choices in enumerate(spoken.of_numbers())])),
        "place": mean_where(both, EXACT * in_picture + in_world),
        "turn": mean_where(there * jnp.any(meant.turn != 0, axis=-1), jnp.mean(jnp.abs(turn - meant.turn), axis=-1)),
    }
    told = {**parts, "off_cm": 100 * REACH / 3 * mean_where(both, in_world), "off_px": SIZE / 4 * mean_where(both, in_picture)}
    return sum(parts.values(), jnp.float32(0)), told


def _layer(head: Any, x: jax.Array) -> jax.Array:
    return x @ head["kernel"] + head["bias"]


def rows_of(patches: jax.Array, levels: Any, merge: int) -> VisionRows:
    """A row a picture, which is one window."""
    rows, count = patches.shape[:2]
    side = round(count**0.5)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
    places = grid.reshape(side // merge, merge, side // merge, merge, 2).transpose(0, 2, 1, 3, 4).reshape(count, 2)
    ones = np.ones((rows, count), np.int32)
    return VisionRows(patches, ones, ones, np.broadcast_to(places.astype(np.int32), (rows, count, 2)), groups=rows, levels=levels)


def looker(config: BackboneConfig, pixels: PixelConfig) -> Callable[[Any, np.ndarray], np.ndarray]:
    """What a tower makes of scenes' pictures [scenes, cameras, size, size, 3]: [scenes, visual tokens, width] float16."""

    @jax.jit
    def tokens(vision: Any, patches: jax.Array) -> jax.Array:
        tower = around(lambda: VisionTower(config.vision, ComputeConfig(), rngs=nnx.Rngs(0)), vision)
        return tower(rows_of(patches, levels_of(pixels), config.vision.merge))

    def look(vision: Any, pictures: np.ndarray) -> np.ndarray:
        patches = np.stack([cut_patches(picture[None], pixels) for picture in pictures.reshape(-1, *pictures.shape[2:])])
        seen = np.asarray(tokens(vision, patches)).astype(np.float16)
        return seen.reshape(len(pictures), -1, seen.shape[-1])

    return look
