"""What `blm data prepare` and `blm data inspect` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from blm_jax.data import inspect as inspection
from blm_jax.data.corpus import REPORT, open_corpus
from blm_jax.data.files import open_path
from blm_jax.data.prepare import Request
from blm_jax.data.prepare import prepare as prepare_corpus
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.sources import open_source
from blm_jax.errors import RequestError


def prepare(
    source: str,
    open_engine: Callable[[], PromptEngine],
    out: str,
    *,
    root: str | None = None,
    workers: int | None = None,
    records_per_shard: int = 4096,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    max_bad: float = 0.01,
) -> dict[str, Any]:
    """Make the corpus `out` of a source. Returns what `blm data prepare --json` prints.

    `open_engine` opens the prompt engine in every process, so it pickles. No workers, 0, is all in this process.
    """
    request = Request(open_source(source), open_engine, out, root, records_per_shard, max_tokens, max_patches)
    info = prepare_corpus(request, len(os.sched_getaffinity(0)) if workers is None else workers, max_bad)
    counts = {name: info[name] for name in ("read", "records", "bad", "tokens", "patches")}
    return {"out": out, **counts, "report": os.fspath(open_path(out) / REPORT)}


def inspect(
    corpus: str, engine: PromptEngine, *, records: Sequence[int] | None = None, count: int = 3, out: str | None = None
) -> dict[str, Any]:
    """What a model sees of some records. Returns what `blm data inspect --json` prints; `text` is for a terminal."""
    prepared = open_corpus(corpus)
    prepared.check(engine)
    if wrong := [number for number in records or () if number >= len(prepared)]:
        raise RequestError(f"{corpus} has the records 0 to {len(prepared) - 1}, and no {wrong[0]}")
    chosen = inspection.spread(len(prepared), count) if records is None else records
    shown = [inspection.look(prepared, number, engine) for number in chosen]
    result: dict[str, Any] = {"corpus": corpus, **{name: prepared.info[name] for name in ("read", "records", "bad", "tokens", "patches")}}
    result["shown"] = [record.summary() for record in shown]
    result["text"] = inspection.as_text(prepared, shown)
    if out is not None:
        result["page"] = inspection.write_page(out, prepared, shown, engine)
        result["text"] += f"\n\n{result['page']} shows the pictures"
    return result
