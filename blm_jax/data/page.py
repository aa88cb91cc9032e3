"""What pages have in common: text that is safe on a terminal too, histograms, and a page that is one file."""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from blm_jax.data.files import open_path, write_whole
from blm_jax.errors import RequestError

BINS = 12  # of a histogram
BAR = 40  # characters of its longest bar
PAGE = "index.html"
INSPECT = "blm data inspect"
GENERATOR = '<meta name="generator" content="{}">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
.prompt { white-space: pre-wrap; font-family: monospace; overflow-wrap: anywhere; background: #f6f6f4; padding: 1rem; border-radius: 4px }
mark { background: #cdeccd; color: inherit }
figure { margin: .5rem 0; display: inline-block; vertical-align: top } figcaption { font-size: 12px; color: #666 }
.prompt img { image-rendering: pixelated } svg { background: #f6f6f4; border-radius: 4px } svg text { font-size: 11px; fill: #444 }
svg[viewBox] { max-width: 100%; height: auto } rect { fill: #5b8bb2 } polyline { fill: none; stroke-width: 1.3 }
"""


def spread(total: int, count: int) -> list[int]:
    """So many numbers below `total`, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def printable(text: str) -> str:
    """Other characters than letters, signs and new lines as escapes: texts of a data set are no commands to a terminal."""
    return "".join(letter if letter == "\n" or letter.isprintable() else repr(letter)[1:-1] for letter in text)


# --- lengths -------------------------------------------------------------------------------------------------------------


def in_words(lengths: np.ndarray) -> str:
    half, most = np.quantile(lengths, [0.5, 0.99], method="inverted_cdf")
    return f"half have up to {half}, 99 % up to {most}, the longest {lengths.max()}, all together {lengths.sum(dtype=np.int64)}"


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """How many are from so long to so long; each bin ends at the same multiple of where it begins."""
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.geomspace(low, high + 1, BINS + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    return [(start, stop - 1, count) for (start, stop), count in zip(itertools.pairwise(edges.tolist()), counts.tolist(), strict=True)]


def bars(lengths: np.ndarray) -> str:
    """The histogram on a terminal."""
    bins = histogram(lengths)
    width, most = len(str(bins[-1][1])), max(count for _, _, count in bins)
    return "\n".join(f"  {low:>{width}} .. {high:>{width}}  {'#' * -(-BAR * count // most):{BAR}}  {count}" for low, high, count in bins)


def drawing(lengths: np.ndarray) -> str:
    """The histogram as SVG: a bar a bin, with its count above and where it begins below."""
    bins = histogram(lengths)
    step, height, most = 64, 120, max(count for _, _, count in bins)
    drawn = []
    for i, (low, _, count) in enumerate(bins):
        x, tall = i * step + 4, height * count / most
        drawn.append(f'<rect x="{x}" y="{20 + height - tall:.1f}" width="{step - 8}" height="{tall:.1f}"/>')
        drawn.append(f'<text x="{x}" y="{14 + height - tall:.1f}">{count}</text><text x="{x}" y="{height + 36}">{low}</text>')
    drawn.append(f'<text x="{len(bins) * step}" y="{height + 36}">{bins[-1][1]}</text>')
    wide, high = len(bins) * step + 60, height + 44
    return f'<svg viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img">{"".join(drawn)}</svg>'


# --- the page ------------------------------------------------------------------------------------------------------------


def page_path(directory: epath.PathLike) -> epath.Path:
    """Where the page goes. Refuses, before any work is done, to write over what is not of this command."""
    path = open_path(directory) / PAGE
    if path.exists() and (path.is_dir() or GENERATOR.format(INSPECT).encode() not in path.read_bytes()[:1000]):
        raise RequestError(f"{path} is there and not of this command: choose another directory")
    return path


def write_page(directory: epath.PathLike, title: str, body: Sequence[str], style: str = "") -> str:
    """What `blm data inspect` shows. Its path."""
    path = page_path(directory)
    write_whole(path, as_page(title, body, style, INSPECT))
    return os.fspath(path)


def as_page(title: str, body: Sequence[str], style: str, command: str) -> bytes:
    """One file that holds all, pictures too. `body` is HTML, `title` text, `command` what made it."""
    # Nothing is fetched and no script runs, whatever texts hold.
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    name = html.escape(title)
    size = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{size}{GENERATOR.format(command)}{policy}<title>{name}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{name}</h1>{"".join(body)}</body></html>\n'.encode()


def picture(pixels: np.ndarray, form: str = "PNG") -> str:
    """An element that holds the pixels [height, width, 3] uint8."""
    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, form)
    height, width = pixels.shape[:2]
    return f'<img width="{width}" height="{height}" alt="" src="{data_url(contents.getvalue(), form)}">'


def data_url(contents: bytes, form: str) -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(contents).decode()}"
