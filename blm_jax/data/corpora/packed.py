"""Conversations as training reads them: rows of a fixed shape, packed from prepared corpora."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from blm_jax.batch import Batch
from blm_jax.data.collate import collate
from blm_jax.data.corpora.budget import Budget, row_budget
from blm_jax.data.corpora.corpus import PreparedCorpus, open_corpus
from blm_jax.data.corpora.packing import propose_row_length
from blm_jax.data.corpora.plan import Sequences
from blm_jax.data.mixture import Mixture, read_shares
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.vision.augment import AugmentConfig, augment, generator
from blm_jax.data.vision.pictures import load_image
from blm_jax.data.vision.pixels import levels_of
from blm_jax.errors import RunError


def open_packed(
    shares: Mapping[str, float | str],
    open_engine: Callable[[], PromptEngine],
    *,
    length: int,
    batch: int,
    seed: int = 0,
    row_length: int | None = None,
    changes: AugmentConfig | None = None,
    plans: epath.PathLike | None = None,
    show: bool = False,
) -> PackedRows:
    """Rows of `length` tokens from prepared corpora, `batch` a step; `shares` are weights or percentages by path of a corpus.

    Without `row_length`, vision rows get the length with which sequences are fullest. `plans` is where epochs' plans are kept.
    """
    corpora = {path: open_corpus(path) for path in shares}
    engine = open_engine()
    for corpus in corpora.values():
        corpus.check(engine)
    parts = read_shares(shares, {path: corpus.info["tokens"] for path, corpus in corpora.items()})
    mixture = Mixture([corpus.in_mixture(parts[path]) for path, corpus in corpora.items()])
    if row_length is None:
        row_length = propose_row_length(mixture, length, engine.config.vision)
    budget = Budget(length, row_budget(row_length, engine.config.vision) if row_length else 0)
    sequences = Sequences(mixture, budget, seed=seed, batch=batch, directory=plans, show=show)
    return PackedRows(list(corpora.values()), sequences, open_engine, row_length, changes or AugmentConfig())


class PackedRows:
    """`sequences` are of a mixture of these corpora, in this order; `row_length` is that of a vision row, 0 where all is text."""

    def __init__(
        self,
        corpora: Sequence[PreparedCorpus],
        sequences: Sequences,
        open_engine: Callable[[], PromptEngine],
        row_length: int,
        changes: AugmentConfig,
    ):
        self.corpora = tuple(corpora)
        self.sequences = sequences
        self.open_engine = open_engine
        self.row_length = row_length
        self.changes = changes

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (self.corpora, self.sequences, self.open_engine, self.row_length, self.changes)

    @cached_property
    def engine(self) -> PromptEngine:
        """A process's own: what reads words and templates does not travel."""
        return self.open_engine()

    def host_rows(self, host: int, hosts: int) -> range:
        return self.sequences.host_rows(host, hosts)

    def read(self, step: int, row: int) -> Batch:
        epoch, number = self.sequences.order(step)[row].tolist()
        records = self.sequences.plan(epoch).sequence(number)
        examples = [self._example(int(record), epoch, number, place) for place, record in enumerate(records)]
        return collate(
            [examples],
            self.engine.config,
            length=self.sequences.budget.tokens,
            vision_row_length=self.row_length or None,
            levels=levels_of(self.engine.pixels),
        )

    def _example(self, record: int, epoch: int, number: int, place: int) -> Example:
        corpus, index = (int(part) for part in self.sequences.mixture.locate(np.array(record)))
        messages = self.corpora[corpus].record(index)
        if self.changes.changes:
            random = generator(self.sequences.seed, epoch, number, place)
            messages = [_changed(message, self.changes, random) for message in messages]
        example = self.engine.encode(messages)
        promised = int(self.corpora[corpus].tokens[index])
        if len(example.tokens) != promised:
            raise RunError(
                f"record {index} of {self.corpora[corpus].path} has {len(example.tokens)} tokens and was prepared as {promised}: "
                "prepare the corpus again"
            )
        return example


def _changed(message: Mapping[str, Any], changes: AugmentConfig, random: np.random.Generator) -> dict[str, Any]:
    """Its pictures changed, each in its own way; videos stay as they are."""

    def part(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return part
        [picture] = augment([np.asarray(load_image(part["image"]))], changes, random)
        return {**part, "image": picture}

    return {**message, "content": [part(one) for one in message["content"]]}
