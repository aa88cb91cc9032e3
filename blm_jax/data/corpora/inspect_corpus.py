"""What a model sees of a corpus: prompts with the tokens that are learned, pictures at their size, how long records are."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm_jax.data import page, prompt_view
from blm_jax.data.corpora.corpus import REPORT, PreparedCorpus
from blm_jax.data.files import open_path
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.prompt_view import BRACKETS, Stretch


@dataclass(frozen=True)
class Shown:
    """A record as the model gets it."""

    number: int
    where: str  # in the source
    example: Example
    stretches: tuple[Stretch, ...]

    def text(self) -> str:
        return prompt_view.as_text(self.stretches)

    def summary(self) -> dict[str, Any]:
        lengths = {"tokens": len(self.example.tokens), "learned": int(self.example.supervised.sum())}
        pictures = [stretch.text for stretch in self.stretches if stretch.picture is not None]
        return {"record": self.number, "where": self.where, **lengths, "pictures": pictures, "prompt": self.text()}


def look(corpus: PreparedCorpus, number: int, engine: PromptEngine) -> Shown:
    stored = corpus.stored(number)
    example = engine.encode(stored.messages)
    where = f"{stored.file}:{stored.line}" if stored.line else f"{stored.file}, record {stored.index}"
    return Shown(number, where, example, tuple(prompt_view.stretches(example, engine)))


def _lengths(corpus: PreparedCorpus) -> list[tuple[str, np.ndarray]]:
    """What there is a histogram of, each with a line about it."""
    tokens, patches = np.asarray(corpus.tokens), np.asarray(corpus.patches)
    with_pictures = patches[patches > 0]
    found = [(f"tokens a record: {page.in_words(tokens)}", tokens)]
    if len(with_pictures):
        share = f"{len(with_pictures)} of {len(patches)} records have pictures"
        found.append((f"patches of vision work a record: {page.in_words(with_pictures)}; {share}", with_pictures))
    return found


def _headline(corpus: PreparedCorpus) -> str:
    info = corpus.info
    bad = f", {info['bad']} bad (see {open_path(corpus.path) / REPORT})" if info["bad"] else ""
    return f"{corpus.path}: {info['records']} records of {info['read']}{bad}"


def as_text(corpus: PreparedCorpus, shown: Sequence[Shown]) -> str:
    blocks = [_headline(corpus)]
    blocks += [f"{line}\n{page.bars(lengths)}" for line, lengths in _lengths(corpus)]
    for record in shown:
        counts = f"{len(record.example.tokens)} tokens, {record.example.supervised.sum()} learned"
        blocks.append(f"record {record.number} ({record.where}): {counts}, between {' and '.join(BRACKETS)}\n{record.text().strip()}")
    return "\n\n".join(blocks)


def write_page(directory: str, corpus: PreparedCorpus, shown: Sequence[Shown], engine: PromptEngine) -> str:
    body = [f"<p>{html.escape(_headline(corpus))}</p>"]
    body += [f"<p>{line}</p>{page.drawing(lengths)}" for line, lengths in _lengths(corpus)]
    for record in shown:
        counts = f"{len(record.example.tokens)} tokens, {record.example.supervised.sum()} learned, which are marked"
        head = f'<h2 id="record-{record.number}">Record {record.number}</h2><p>{html.escape(record.where)}: {counts}</p>'
        prompt = prompt_view.as_html(record.stretches, record.example, engine.pixels)
        body.append(f"<section>{head}{prompt}</section>")
    return page.write_page(directory, corpus.path, body)
