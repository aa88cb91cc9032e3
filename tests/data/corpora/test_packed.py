"""Packed rows of prepared corpora, through loaders: what a row holds, and that it is the same wherever it is read."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blm_jax.batch import Batch
from blm_jax.data import command
from blm_jax.data.collate import collate
from blm_jax.data.corpora import plan as plan_module
from blm_jax.data.corpora.corpus import open_corpus
from blm_jax.data.corpora.packed import PackedRows, open_packed
from blm_jax.data.loader import Loader, Rows
from blm_jax.data.vision.augment import AugmentConfig
from blm_jax.data.vision.pixels import levels_of
from blm_jax.errors import RequestError, RunError
from tests.data.corpora.material import asked, open_engine, write_lines, write_source
from tests.qwen_files import write_tokenizer_files

SHORT = 56 * 56  # pixels: pictures of four visual tokens at most
RESTARTS = [(2, 1), (4, 0)]  # hosts and workers; the run before has one host and no worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer_files(tmp_path_factory.mktemp("short"), max_pixels=SHORT))


@pytest.fixture(scope="module")
def corpora(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One with pictures and videos, one of text alone."""
    folder = tmp_path_factory.mktemp("corpora")
    seen = write_source(folder / "source", 60)
    told = write_lines(folder / "told.jsonl", (asked(f"What of {i}?", "Much. " * (i % 9 + 1)) for i in range(40)))
    made = {}
    for name, source in (("seen", seen), ("told", told)):
        made[name] = str(folder / name)
        command.prepare(str(source), functools.partial(open_engine, model), made[name], workers=0, records_per_shard=16)
    return made


def packed(corpora: dict[str, str], model: str, seen: float | str = 3, **settings: Any) -> PackedRows:
    shares = {corpora["seen"]: seen, corpora["told"]: "50 %"}
    return open_packed(shares, functools.partial(open_engine, model), **{"length": 512, "batch": 4, **settings})


def arrays(batch: Any) -> list[np.ndarray]:
    values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    nested = [arrays(value) if dataclasses.is_dataclass(value) else [value] for value in values]
    return [leaf for leaves in nested for leaf in leaves if isinstance(leaf, np.ndarray)]


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(one), arrays(other), strict=True))


def read(rows: Rows[Batch], first: int, steps: int, hosts: int = 1, workers: int = 0) -> list[list[np.ndarray]]:
    """The global batches of some steps, put together from what each host reads."""
    parts = []
    for host in range(hosts):
        loader = Loader(rows, start=first, host=host, hosts=hosts, workers=workers)
        parts.append([arrays(next(loader)) for _ in range(steps)])
        loader.close()
    return [[np.concatenate(part) for part in zip(*(host[step] for host in parts), strict=True)] for step in range(steps)]


def test_a_row_holds_its_records(corpora: dict[str, str], model: str) -> None:
    rows = packed(corpora, model)
    opened = [open_corpus(corpora[name]) for name in ("seen", "told")]
    kinds = set()
    for step in range(3):
        for row in range(4):
            corpus, numbers = rows.sequences.mixture.locate(rows.sequences.row(step, row))
            examples = [opened[c].example(n, rows.engine) for c, n in zip(corpus.tolist(), numbers.tolist(), strict=True)]
            levels = levels_of(rows.engine.pixels)
            expected = collate([examples], rows.engine.config, length=512, vision_row_length=rows.row_length, levels=levels)
            own = np.array([-1, *corpus])[expected.segments]  # whose loss is told as whose
            assert same(rows.read(step, row), dataclasses.replace(expected, sources=own))
            kinds |= set(corpus.tolist())
    assert kinds == {0, 1}


def test_a_restart_elsewhere_reads_the_same(corpora: dict[str, str], model: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"changes": AugmentConfig(crop=0.1, brightness=0.2), "seed": 7}
    rows = packed(corpora, model, **settings)
    whole = read(rows, 0, 5)
    assert rows.sequences.locate(5 * 4 - 1)[0] > 0  # the steps reach beyond an epoch
    for stop, (hosts, workers) in enumerate(RESTARTS, start=1):
        rest = read(packed(corpora, model, plans=tmp_path, **settings), stop, 5 - stop, hosts, workers)
        for one, other in zip(whole[stop:], rest, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """Rows that no worker makes a plan for."""

    rows: PackedRows

    def host_rows(self, host: int, hosts: int) -> range:
        return self.rows.host_rows(host, hosts)

    def ready(self, step: int) -> None:
        self.rows.ready(step)

    def read(self, step: int, row: int) -> Batch:
        if multiprocessing.parent_process() is not None:
            plan_module.make_plan = lambda *_, **__: 1 / 0
        return self.rows.read(step, row)


def test_plans_are_made_here_and_mapped_by_workers(corpora: dict[str, str], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the ends of epochs too: the next one's is made while this one is read."""
    made: list[int] = []
    make = plan_module.make_plan
    monkeypatch.setattr(plan_module, "make_plan", lambda *args, **kwargs: made.append(args[3]) or make(*args, **kwargs))

    def opened() -> PackedRows:
        return open_packed({corpora["told"]: 1}, functools.partial(open_engine, model), length=48, batch=2)

    expected, rows = opened(), opened()
    found = read(Forbidden(rows), 2, 40, workers=2)
    last = rows.sequences.locate(2 * 42 - 1)[0]
    assert last > 1 and made == [*range(made[-1] + 1)] and made[-1] in (last, last + 1)
    for step, arrays_read in enumerate(found, 2):
        wanted = [arrays(expected.read(step, row)) for row in range(2)]
        assert all(np.array_equal(x, np.concatenate(y)) for x, y in zip(arrays_read, zip(*wanted, strict=True), strict=True))


def test_lengths_do_not_travel(corpora: dict[str, str], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are not read again: what a worker needs to know of them is in the plan."""
    rows = packed(corpora, model)
    rows.ready(0)
    data = pickle.dumps(rows)
    for name in ("tokens", "patches"):
        part = getattr(open_corpus(corpora["seen"]), name)
        assert np.ascontiguousarray(part).tobytes() not in data and part.astype(np.uint32).tobytes() not in data
    monkeypatch.setattr(plan_module, "make_plan", lambda *_, **__: pytest.fail("it was made again"))
    monkeypatch.setattr("blm_jax.data.mixture.digest", lambda _: pytest.fail("lengths were read again"))
    assert same(pickle.loads(data).read(0, 0), rows.read(0, 0))


def test_seeds_and_epochs_change_pictures(corpora: dict[str, str], model: str) -> None:
    """The same record, seen again, is augmented anew; its tokens stay what they were."""
    rows = packed(corpora, model, changes=AugmentConfig(crop=0.2, brightness=0.3, contrast=0.3, saturation=0.3))
    plain = packed(corpora, model)
    again = packed(corpora, model, changes=rows.changes)
    changed, known = rows.read(0, 0), plain.read(0, 0)
    assert changed.vision is not None and known.vision is not None
    assert np.array_equal(changed.tokens, known.tokens) and not np.array_equal(changed.vision.patches, known.vision.patches)
    assert same(changed, again.read(0, 0))
    assert not same(changed, packed(corpora, model, changes=rows.changes, seed=1).read(0, 0))


def test_where_a_corpus_lies_changes_nothing(corpora: dict[str, str], model: str, tmp_path: Path) -> None:
    moved = {**corpora, "seen": str(shutil.copytree(corpora["seen"], tmp_path / "elsewhere"))}
    for seen in (3, "70 %"):
        rows, others = packed(corpora, model, seen=seen), packed(moved, model, seen=seen)
        for step in range(4):
            assert all(np.array_equal(x, y) for x, y in zip(rows.sequences.rows(step), others.sequences.rows(step), strict=True))


def test_text_alone_has_no_vision(corpora: dict[str, str], model: str) -> None:
    rows = open_packed({corpora["told"]: 1}, functools.partial(open_engine, model), length=256, batch=2)
    assert rows.row_length == 0 and rows.read(0, 1).vision is None


def test_a_row_without_pictures_has_the_shape_of_others(corpora: dict[str, str], model: str) -> None:
    rows = packed(corpora, model, seen="10 %", length=330, batch=8)
    found = [rows.read(0, row) for row in range(8)]
    assert len({tuple(array.shape for array in arrays(batch)) for batch in found}) == 1
    assert {bool(batch.vision is not None and batch.vision.frames.any()) for batch in found} == {True, False}


def test_another_model_is_refused(corpora: dict[str, str], model: str, tmp_path: Path) -> None:
    other = write_tokenizer_files(tmp_path / "other", max_pixels=2 * SHORT)
    with pytest.raises(RequestError, match="another pixels: prepare it again"):
        packed(corpora, str(other))
    rows = packed(corpora, model)
    rows.open_engine = functools.partial(open_engine, str(other))
    with pytest.raises(RunError, match="was prepared as"):
        [rows.read(step, row) for step in range(4) for row in range(4)]
