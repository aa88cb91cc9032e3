"""Conversations as training reads them: rows of a fixed shape, packed from prepared corpora."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
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
from blm_jax.data.loader import host_rows
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
    mixture = _mixture(list(corpora.values()), [parts[path] for path in corpora])
    if row_length is None:
        row_length = propose_row_length(mixture, length, engine.config.vision)
    budget = Budget(length, row_budget(row_length, engine.config.vision, mixture.whole) if row_length else 0)
    sequences = Sequences(mixture, budget, seed=seed, batch=batch, directory=plans, show=show)
    return PackedRows(list(corpora.values()), sequences, open_engine, row_length, changes or AugmentConfig())


def _mixture(corpora: Sequence[PreparedCorpus], shares: Sequence[Fraction], identity: list[Any] | None = None) -> Mixture:
    return Mixture([corpus.in_mixture(share) for corpus, share in zip(corpora, shares, strict=True)], identity)


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
        # Lengths do not travel: they lie in the corpora.
        mixture = self.sequences.mixture
        parts = self.corpora, [corpus.share for corpus in mixture.corpora], mixture.identity
        return _reopened, (parts, self.sequences.elsewhere(), self.open_engine, self.row_length, self.changes)

    @cached_property
    def engine(self) -> PromptEngine:
        """A process's own: what reads words and templates does not travel."""
        return self.open_engine()

    def host_rows(self, host: int, hosts: int) -> range:
        return host_rows(self.sequences.batch, host, hosts)

    def ready(self, step: int) -> None:
        self.sequences.ready(step)

    def read(self, step: int, row: int) -> Batch:
        epoch, number = self.sequences.order(step)[row].tolist()
        records = self.sequences.plan(epoch).sequence(number)
        examples = [self._example(int(record), epoch, number, place) for place, record in enumerate(records)]
        batch = collate(
            [examples],
            self.engine.config,
            length=self.sequences.budget.tokens,
            vision_row_length=self.row_length or None,
            levels=levels_of(self.engine.pixels),
        )
        corpora = np.array([-1, *self.sequences.mixture.locate(np.asarray(records))[0]], np.int32)  # padding is of none
        return replace(batch, sources=corpora[batch.segments])

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


def _reopened(
    parts: tuple[Sequence[PreparedCorpus], Sequence[Fraction], list[Any]], sequences: Callable[[Mixture], Sequences], *rest: Any
) -> PackedRows:
    return PackedRows(parts[0], sequences(_mixture(*parts)), *rest)


def _changed(message: Mapping[str, Any], changes: AugmentConfig, random: np.random.Generator) -> dict[str, Any]:
    """Its pictures changed, each in its own way; videos stay as they are."""

    def part(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return part
        [picture] = augment([np.asarray(load_image(part["image"]))], changes, random)
        return {**part, "image": picture}

    return {**message, "content": [part(one) for one in message["content"]]}
