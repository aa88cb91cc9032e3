"""What `blm data prepare` and `blm data inspect` do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from blm_jax.config import Instruction, PolicyConfig
from blm_jax.data import page
from blm_jax.data.corpora import inspect_corpus
from blm_jax.data.corpora.corpus import INFO, PREPARING, REPORT, open_corpus
from blm_jax.data.corpora.prepare import Request
from blm_jax.data.corpora.prepare import prepare as prepare_corpus
from blm_jax.data.corpora.sources import open_source
from blm_jax.data.demos import episode_page, inspect_episodes
from blm_jax.data.demos.robots import find_robot, load_robots
from blm_jax.data.demos.sets import check_layout, open_set
from blm_jax.data.demos.survey import read_survey
from blm_jax.data.files import open_path
from blm_jax.data.prompt import PromptEngine
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


def is_corpus(path: str) -> bool:
    """Whether a directory is a corpus of conversations, prepared or half so. Refuses what is no data at all."""
    place = open_path(path)
    if not place.is_dir():
        raise RequestError(f"{path} is no directory: name a corpus, as `blm data prepare` writes them, or a set of demonstrations")
    return (place / INFO).exists() or (place / PREPARING).exists()


def show_corpus(
    path: str, engine: PromptEngine, *, records: Sequence[int] | None = None, count: int = 3, out: str | None = None
) -> dict[str, Any]:
    """What a model sees of some records. Returns what `blm data inspect --json` prints; `text` is for a terminal."""
    if out is not None:
        page.page_path(out)
    prepared = open_corpus(path)
    prepared.check(engine)
    chosen = _chosen(records, count, len(prepared), f"{path} has the records")
    shown = [inspect_corpus.look(prepared, number, engine) for number in chosen]
    result: dict[str, Any] = {"corpus": path, **{name: prepared.info[name] for name in ("read", "records", "bad", "tokens", "patches")}}
    result["shown"] = [record.summary() for record in shown]
    result["text"] = inspect_corpus.as_text(prepared, shown)
    if out is not None:
        _add_page(result, inspect_corpus.write_page(out, prepared, shown, engine))
    return result


def show_demonstrations(
    path: str,
    robot: str | None,
    *,
    robots_files: Sequence[str] = (),
    stats: str | None = None,
    engine: PromptEngine | None = None,
    instruction: Instruction = PolicyConfig.instruction,
    episodes: Sequence[int] | None = None,
    count: int = 3,
    out: str | None = None,
) -> dict[str, Any]:
    """What a policy sees of some episodes; with an engine, the prompt too. Returns what `show_corpus` returns of conversations."""
    if out is not None:
        page.page_path(out)
    source, robots = open_set(path), load_robots(robots_files)
    if robot is None:
        raise RequestError(f"{path} holds demonstrations: say with --robot of which robot; known are {', '.join(robots)}")
    entry = find_robot(robot, robots)
    check_layout(source, entry)
    survey = None if stats is None else read_survey(stats, entry)
    if source.count == 0:
        raise RequestError(f"{path} holds no episode")
    chosen = _chosen(episodes, count, source.count, f"{path} has the episodes")
    shown = [inspect_episodes.look(source, entry, number, engine, instruction) for number in chosen]
    found = inspect_episodes.overview(source, entry, survey, shown)
    result = inspect_episodes.summary(source, entry, found, shown)
    result["text"] = inspect_episodes.as_text(source, entry, found, shown)
    if out is not None:
        statistics = None if survey is None else survey.statistics
        _add_page(result, episode_page.write_page(out, source, entry, found, shown, statistics, engine))
    return result


def _chosen(numbers: Sequence[int] | None, count: int, total: int, what: str) -> Sequence[int]:
    """The numbers that were asked for, or so many of all."""
    if wrong := [number for number in numbers or () if number >= total]:
        raise RequestError(f"{what} 0 to {total - 1}, and no {wrong[0]}")
    return page.spread(total, count) if numbers is None else numbers


def _add_page(result: dict[str, Any], path: str) -> None:
    result["page"] = path
    result["text"] += f"\n\n{path} shows the pictures"
