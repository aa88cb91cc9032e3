"""Work of several processes: results in order, and none lost when a process dies of what it reads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blm_jax.data.workers import AHEAD, in_order
from blm_jax.errors import RequestError, RunError

Task = list[int]


def squares() -> Callable[..., list[Any]]:
    """Squares of a task's numbers; some numbers are trouble."""

    def work(task: Task, begin: Callable[[int], None], deadly: Mapping[int, str]) -> list[Any]:
        found: list[Any] = []
        for place, number in enumerate(task):
            begin(place)
            if place in deadly:
                found.append(deadly[place])
                continue
            if number == -1:
                os.kill(os.getpid(), signal.SIGSEGV)
            if number == -2:
                os._exit(3)
            if number == -3:
                raise RequestError("not this one")
            if number == -4:
                raise ZeroDivisionError("by zero")
            found.append(number**2)
        return found

    return work


def dying_once(marker: Path) -> Callable[..., Any]:
    """The first process that takes on a task dies, as one that the system ends for want of memory."""

    def work(task: Task, begin: Callable[[int], None], deadly: Mapping[int, str]) -> list[Any]:
        begin(0)
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return [task, dict(deadly)]
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    return work


def dead_from_the_start() -> Callable[..., Any]:
    os._exit(5)


def refusing() -> Callable[..., Any]:
    raise RequestError("no such model")


def meeting(folder: Path, others: int) -> Callable[..., int]:
    """Begins when so many processes are there."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < others:
        if time.monotonic() > deadline:
            raise RequestError("the others do not come")
        time.sleep(0.01)
    return lambda task, begin, deadly: len(task)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    tasks = [[i, i + 1] for i in range(20)]
    assert list(in_order(tasks, workers, squares)) == [[i**2, (i + 1) ** 2] for i in range(20)]


def test_processes_start_together(tmp_path: Path) -> None:
    """A task larger than what a pipe holds waits for one that reads it, and keeps no other from starting."""
    size = 2**21
    assert list(in_order([b"x" * size] * 4, 3, partial(meeting, tmp_path, 3))) == [size] * 4


def test_tasks_are_read_only_a_little_ahead() -> None:
    """A source of terabytes is not held in memory while the first of its tasks takes long."""
    read = 0

    def tasks() -> Iterator[Task]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield [i]

    results = in_order(tasks(), 1, squares)
    next(results)
    assert read <= AHEAD + 2
    results.close()


def test_what_ends_processes_is_left_out() -> None:
    tasks = [[1, 2], [3, -1, 4, -2], [5]]
    reasons = ["a process that reads it ends with signal SIGSEGV", "a process that reads it ends with exit code 3"]
    assert list(in_order(tasks, 2, squares)) == [[1, 4], [9, reasons[0], 16, reasons[1]], [25]]


def test_a_process_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    assert list(in_order([[1], [2]], 1, partial(dying_once, tmp_path / "died"))) == [[[1], {}], [[2], {}]]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_come_across(workers: int) -> None:
    with pytest.raises(RequestError, match="not this one"):
        list(in_order([[1], [-3]], workers, squares))
    with pytest.raises(RequestError, match="no such model"):
        list(in_order([[1]], workers, refusing))
    with pytest.raises(RunError if workers else ZeroDivisionError, match="by zero"):
        list(in_order([[-4]], workers, squares))


def test_processes_that_cannot_even_start() -> None:
    with pytest.raises(RunError, match="end with exit code 5: is there enough memory"):
        list(in_order([[1]], 1, dead_from_the_start))
