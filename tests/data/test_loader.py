"""Loaders: the same batches wherever a run goes on, whoever reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from blm_jax.batch import Array, VisionRows
from blm_jax.data.loader import Loader, host_rows, joined
from blm_jax.errors import RequestError

BATCH = 8


@dataclass(frozen=True)
class Told:
    step: Array
    pictures: VisionRows
    nothing: Array | None = None


@dataclass(frozen=True)
class Telling:
    """Rows that say which they are."""

    broken: int = -1  # step that cannot be read

    def host_rows(self, host: int, hosts: int) -> range:
        return host_rows(BATCH, host, hosts)

    def read(self, step: int, row: int) -> Told:
        if step == self.broken:
            raise RequestError("this row is broken")
        told = np.array([[step, row]])
        return Told(told, VisionRows(told[..., None] * 0.5, told, told, told[..., None]))


def taken(count: int, **settings: Any) -> list[Told]:
    loader = Loader(Telling(), **settings)
    found = [next(loader) for _ in range(count)]
    loader.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(workers: int) -> None:
    for step, batch in enumerate(taken(3, start=5, workers=workers), start=5):
        assert batch.step.tolist() == [[step, row] for row in range(BATCH)]
        assert batch.nothing is None
        assert type(batch.pictures) is VisionRows and batch.pictures.groups == BATCH
        assert np.array_equal(batch.pictures.patches[..., 0], 0.5 * batch.step)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_cut_a_batch(hosts: int) -> None:
    parts = [taken(2, host=host, hosts=hosts)[1].step for host in range(hosts)]
    assert np.array_equal(np.concatenate(parts), taken(2)[1].step)


def test_what_cannot_be_cut_is_refused() -> None:
    for host, hosts in ((0, 3), (2, 2), (-1, 1)):
        with pytest.raises(RequestError, match=rf"a batch of 8 rows cannot be cut for host {host} of {hosts}: make it a multiple"):
            host_rows(BATCH, host, hosts)
    with pytest.raises(RequestError, match="a batch has 0 rows: it must have at least 1"):
        host_rows(0, 0, 1)


@dataclass(frozen=True)
class Preparing(Telling):
    """Asks to be told."""

    told: list[int] = field(default_factory=list)

    def ready(self, step: int) -> None:
        self.told.append(step)


def test_rows_are_told_of_each_step() -> None:
    loader = Loader(rows := Preparing(), start=3)
    for _ in range(3):
        next(loader)
    loader.close()
    assert rows.told == [3, 4, 5]


def test_a_run_goes_on_from_its_state() -> None:
    loader = Loader(Telling(), ahead=3)
    for _ in range(4):
        next(loader)
    state = loader.state()
    loader.close()
    assert state == {"step": 4}
    [batch] = taken(1, start=state["step"])
    assert batch.step[0, 0] == 4


def test_waiting_is_measured() -> None:
    loader = Loader(Telling())
    next(loader)
    assert 0 < loader.waited < 10
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_arrives(workers: int) -> None:
    loader = Loader(Telling(broken=1), workers=workers)
    next(loader)
    with pytest.raises(Exception, match="this row is broken"):
        next(loader)
    loader.close()


@dataclass(frozen=True)
class Once(Telling):
    """Cannot be read the first time."""

    failures: list[int] = field(default_factory=lambda: [2])

    def read(self, step: int, row: int) -> Told:
        if step == 1 and row in self.failures:
            self.failures.remove(row)
            raise RequestError("this row is broken")
        return super().read(step, row)


def test_who_goes_on_in_spite_of_an_error_gets_whole_batches() -> None:
    loader = Loader(Once(), ahead=1)
    next(loader)
    with pytest.raises(RequestError):
        next(loader)
    assert next(loader).step.tolist() == [[1, row] for row in range(BATCH)]
    loader.close()


def test_a_closed_loader_begins_again_where_it_was() -> None:
    loader = Loader(Telling())
    next(loader)
    loader.close()
    assert next(loader).step[0, 0] == 1
    loader.close()


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(RequestError, match="starts at step -1"):
        Loader(Telling(), start=-1)


def test_only_arrays_are_joined() -> None:
    with pytest.raises(TypeError, match="not of str"):
        joined(["a"])
