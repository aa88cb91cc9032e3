"""What a model sees of a corpus: prompts with the tokens that are learned, pictures at their size, how long records are.

Pictures are made again from the patches that training reads, so nothing is shown that the model does not get.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from blm_jax.data.corpus import REPORT, PreparedCorpus
from blm_jax.data.files import open_path, write_whole
from blm_jax.data.pictures import Picture
from blm_jax.data.pixels import PixelConfig
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.errors import RequestError

BRACKETS = "\u27e6", "\u27e7"  # around what is learned, on a terminal: hardly any text has them
BINS = 12  # of a histogram
BAR = 40  # characters of its longest bar
MOST_FRAMES = 32  # of a video that the page shows
PAGE = "index.html"
GENERATOR = '<meta name="generator" content="blm data inspect">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
div { white-space: pre-wrap; font-family: monospace; overflow-wrap: anywhere; background: #f6f6f4; padding: 1rem; border-radius: 4px }
mark { background: #cdeccd; color: inherit }
figure { margin: .5rem 0; display: inline-block; vertical-align: top } figcaption { font-size: 12px; color: #666 }
img { image-rendering: pixelated } svg { background: #f6f6f4; border-radius: 4px } svg text { font-size: 11px; fill: #444 }
rect { fill: #5b8bb2 }
"""


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that are alike: of one picture, learned text, or text that is not."""

    text: str  # of a picture: what it is
    learned: bool
    picture: int | None = None  # which of the example's


@dataclass(frozen=True)
class Shown:
    """A record as the model gets it."""

    number: int
    where: str  # in the source
    example: Example
    stretches: tuple[Stretch, ...]

    def text(self) -> str:
        """The prompt with pictures by what they are, and brackets around what is learned."""
        learned = BRACKETS[0] + "{}" + BRACKETS[1]
        return "".join(learned.replace("{}", stretch.text) if stretch.learned else stretch.text for stretch in self.stretches)

    def summary(self) -> dict[str, Any]:
        lengths = {"tokens": len(self.example.tokens), "learned": int(self.example.supervised.sum())}
        pictures = [stretch.text for stretch in self.stretches if stretch.picture is not None]
        return {"record": self.number, "where": self.where, **lengths, "pictures": pictures, "prompt": self.text()}


def look(corpus: PreparedCorpus, number: int, engine: PromptEngine) -> Shown:
    stored = corpus.stored(number)
    example = engine.encode(stored.messages)
    where = f"{stored.file}:{stored.line}" if stored.line else f"{stored.file}, record {stored.index}"
    return Shown(number, where, example, tuple(stretches(example, engine)))


def stretches(example: Example, engine: PromptEngine) -> list[Stretch]:
    merge = engine.config.vision.merge
    counts = [picture.grid.visual_tokens(merge) for picture in example.pictures]
    owners = np.full(len(example.tokens), -1)  # the picture of each token
    owners[np.isin(example.tokens, (engine.config.tokens.image, engine.config.tokens.video))] = np.repeat(np.arange(len(counts)), counts)
    changes = np.flatnonzero((np.diff(owners) != 0) | (np.diff(example.supervised) != 0)) + 1
    found: list[Stretch] = []
    for start, stop in itertools.pairwise([0, *changes.tolist(), len(owners)]):
        learned, owner = bool(example.supervised[start]), int(owners[start])
        if owner < 0:
            text = engine.tokenizer.decode(example.tokens[start:stop], skip_special=False)
            found.append(Stretch(printable(text), learned))
        else:
            found.append(Stretch(_placeholder(owner, example.pictures[owner], engine.pixels), learned, owner))
    return found


def _placeholder(number: int, picture: Picture, config: PixelConfig) -> str:
    grid = picture.grid
    size, tokens = f"{grid.columns * config.patch}x{grid.rows * config.patch}", f"{grid.visual_tokens(config.merge)} tokens"
    if grid.seconds is None:
        return f"[picture {number + 1}: image of {size}, {tokens}]"
    frames = grid.frames * config.temporal_patch
    return f"[picture {number + 1}: video of {frames} frames of {size}, {grid.frames * grid.seconds:.3g} s, {tokens}]"


def printable(text: str) -> str:
    """Other characters than letters, signs and new lines as escapes: texts of a corpus are no commands to a terminal."""
    return "".join(letter if letter == "\n" or letter.isprintable() else repr(letter)[1:-1] for letter in text)


def frames_of(picture: Picture, config: PixelConfig) -> np.ndarray:
    """The pixels [frames, height, width, 3] uint8 that were cut into these patches."""
    grid, merge, patch, depth = picture.grid, config.merge, config.patch, config.temporal_patch
    shape = (grid.frames, grid.rows // merge, grid.columns // merge, merge, merge, 3, depth, patch, patch)
    # The order of `cut_patches` undone: [time, depth, rows, merge, patch, columns, merge, patch, channels].
    values = picture.patches.reshape(shape).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    values = values.reshape(grid.frames * depth, grid.rows * patch, grid.columns * patch, 3)
    pixels = (values * np.array(config.std, np.float32) + np.array(config.mean, np.float32)) / config.rescale
    return np.rint(pixels).astype(np.uint8)


def spread(records: int, count: int) -> list[int]:
    """Numbers of so many records, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, records - 1, min(count, records)).round().astype(int)).tolist()


# --- lengths -------------------------------------------------------------------------------------------------------------


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """How many records are from so long to so long; each bin ends at the same multiple of where it begins."""
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.geomspace(low, high + 1, BINS + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    return [(start, stop - 1, count) for (start, stop), count in zip(itertools.pairwise(edges.tolist()), counts.tolist(), strict=True)]


def _lengths(corpus: PreparedCorpus) -> list[tuple[str, np.ndarray]]:
    """What there is a histogram of, each with a line about it."""
    tokens, patches = np.asarray(corpus.tokens), np.asarray(corpus.patches)
    with_pictures = patches[patches > 0]
    found = [(f"tokens a record: {_spread(tokens)}", tokens)]
    if len(with_pictures):
        share = f"{len(with_pictures)} of {len(patches)} records have pictures"
        found.append((f"patches of vision work a record: {_spread(with_pictures)}; {share}", with_pictures))
    return found


def _spread(lengths: np.ndarray) -> str:
    half, most = np.quantile(lengths, [0.5, 0.99], method="inverted_cdf")
    return f"half have up to {half}, 99 % up to {most}, the longest {lengths.max()}, all together {lengths.sum(dtype=np.int64)}"


def _headline(corpus: PreparedCorpus) -> str:
    info = corpus.info
    bad = f", {info['bad']} bad (see {open_path(corpus.path) / REPORT})" if info["bad"] else ""
    return f"{corpus.path}: {info['records']} records of {info['read']}{bad}"


# --- on a terminal -------------------------------------------------------------------------------------------------------


def as_text(corpus: PreparedCorpus, shown: Sequence[Shown]) -> str:
    blocks = [_headline(corpus)]
    blocks += [f"{line}\n{_bars(histogram(lengths))}" for line, lengths in _lengths(corpus)]
    for record in shown:
        counts = f"{len(record.example.tokens)} tokens, {record.example.supervised.sum()} learned"
        blocks.append(f"record {record.number} ({record.where}): {counts}, between {' and '.join(BRACKETS)}\n{record.text().strip()}")
    return "\n\n".join(blocks)


def _bars(bins: Sequence[tuple[int, int, int]]) -> str:
    width, most = len(str(bins[-1][1])), max(count for _, _, count in bins)
    return "\n".join(f"  {low:>{width}} .. {high:>{width}}  {'#' * -(-BAR * count // most):{BAR}}  {count}" for low, high, count in bins)


# --- as a page -----------------------------------------------------------------------------------------------------------


def write_page(directory: str, corpus: PreparedCorpus, shown: Sequence[Shown], engine: PromptEngine) -> str:
    """One file that holds all, pictures too. Its path."""
    path = open_path(directory) / PAGE
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:1000]:
        raise RequestError(f"{path} is there and not of this command: choose another directory")
    title = html.escape(corpus.path)
    lengths = "".join(f"<p>{line}</p>{_drawing(histogram(lengths))}" for line, lengths in _lengths(corpus))
    records = "".join(_section(record, engine.pixels) for record in shown)
    # Nothing is fetched and no script runs, whatever texts hold.
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    head = f'<meta charset="utf-8">{GENERATOR}{policy}<title>{title}</title><style>{STYLE}</style>'
    body = f"<h1>{title}</h1><p>{html.escape(_headline(corpus))}</p>{lengths}{records}"
    write_whole(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'.encode())
    return os.fspath(path)


def _section(record: Shown, config: PixelConfig) -> str:
    parts = []
    for stretch in record.stretches:
        text = html.escape(stretch.text)
        if stretch.picture is not None:
            parts.append(_figure(text, record.example.pictures[stretch.picture], config))
        else:
            parts.append(f"<mark>{text}</mark>" if stretch.learned else text)
    counts = f"{len(record.example.tokens)} tokens, {record.example.supervised.sum()} learned, which are marked"
    head = f'<h2 id="record-{record.number}">Record {record.number}</h2><p>{html.escape(record.where)}: {counts}</p>'
    return f"<section>{head}<div>{''.join(parts)}</div></section>"


def _figure(caption: str, picture: Picture, config: PixelConfig) -> str:
    frames = frames_of(picture, config)
    if picture.grid.seconds is None:
        frames = frames[:1]  # the others are its copies
    chosen = spread(len(frames), MOST_FRAMES)
    if len(chosen) < len(frames):
        caption += f", {len(chosen)} of its frames"
    height, width = frames.shape[1:3]
    images = "".join(f'<img width="{width}" height="{height}" alt="" src="{_data_url(frames[i])}">' for i in chosen)
    return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"


def _data_url(pixels: np.ndarray) -> str:
    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, "PNG")
    return f"data:image/png;base64,{base64.b64encode(contents.getvalue()).decode()}"


def _drawing(bins: Sequence[tuple[int, int, int]]) -> str:
    """The histogram as SVG: a bar a bin, with its count above and where it begins below."""
    step, height, most = 64, 120, max(count for _, _, count in bins)
    drawn = []
    for i, (low, _, count) in enumerate(bins):
        x, tall = i * step + 4, height * count / most
        drawn.append(f'<rect x="{x}" y="{20 + height - tall:.1f}" width="{step - 8}" height="{tall:.1f}"/>')
        drawn.append(f'<text x="{x}" y="{14 + height - tall:.1f}">{count}</text><text x="{x}" y="{height + 36}">{low}</text>')
    drawn.append(f'<text x="{len(bins) * step}" y="{height + 36}">{bins[-1][1]}</text>')
    return f'<svg width="{len(bins) * step + 60}" height="{height + 44}" role="img">{"".join(drawn)}</svg>'
