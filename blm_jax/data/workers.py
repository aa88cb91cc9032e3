"""Tasks done by several processes, with results in the order of the tasks.

What decodes pictures and videos is native code, and a broken file may end the process that reads it. A task is then begun again,
and an item of it that ends two processes is named to the third, which leaves it out.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from blm_jax.errors import RequestError, RunError

Task = TypeVar("Task")
Result = TypeVar("Result")
# Does a task; it says before each item that it begins it, and leaves out items that are known to end processes, for the reason given.
Work = Callable[[Task, Callable[[int], None], Mapping[int, str]], Result]

AHEAD = 4  # tasks a worker may be ahead of the result that is waited for
STARTING = -1


@dataclass
class _Job(Generic[Task]):
    number: int
    task: Task
    deaths: Counter[int] = field(default_factory=Counter)  # of processes, by the item they were at
    deadly: dict[int, str] = field(default_factory=dict)


def in_order(tasks: Iterable[Task], workers: int, make: Callable[[], Work[Task, Result]]) -> Generator[Result, None, None]:
    """The result of each task. `make` is called in every process, in this one if there are no workers."""
    if not workers:
        work = make()
        for task in tasks:
            yield work(task, lambda _: None, {})
        return
    team: list[_Worker] = []
    try:
        yield from _results(team, workers, (_Job(number, task) for number, task in enumerate(tasks)), make)
    finally:
        for worker in team:
            worker.end()


def _results(team: list[_Worker], most: int, jobs: Iterator[_Job[Task]], make: Callable[[], Work[Task, Result]]) -> Iterator[Any]:
    again: deque[_Job[Task]] = deque()
    done: dict[int, Any] = {}
    wanted = given = 0
    more = True
    while more or again or done or any(worker.job for worker in team):
        while again or (more and given < wanted + AHEAD * most):
            worker = next((worker for worker in team if worker.job is None), None)
            if worker is None and len(team) == most:
                break
            job = again.popleft() if again else next(jobs, None)
            if job is None:
                more = False
                break
            given = max(given, job.number + 1)
            if worker is None:  # as many processes as there is work for
                worker = _Worker(make)
                team.append(worker)
            worker.begin(job)
        busy = {worker.pipe: worker for worker in team if worker.job is not None}
        for pipe in wait(list(busy)) if busy else []:
            worker = busy[pipe]  # type: ignore[index]
            job = worker.job
            assert job is not None
            try:
                if worker.ready:
                    done[job.number] = worker.result()
                else:
                    worker.welcome()
            except (EOFError, ConnectionError):
                again.append(worker.mourn())
                team.remove(worker)
        while wanted in done:
            yield done.pop(wanted)
            wanted += 1


class _Worker:
    def __init__(self, make: Callable[[], Work]):
        context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
        self.pipe, theirs = context.Pipe()
        self.at = context.RawValue("q", STARTING)  # the item it has begun
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, self.at, make), daemon=True)
        self.process.start()
        theirs.close()
        self.job: _Job | None = None
        self.ready = False

    def begin(self, job: _Job) -> None:
        self.job = job
        if self.ready:  # sending a large task waits for a reader, and others are to be started meanwhile
            self._send(job)

    def welcome(self) -> None:
        """It has started, and gets its first task."""
        self._receive()
        self.ready = True
        assert self.job is not None
        self._send(self.job)

    def result(self) -> Any:
        value = self._receive()
        self.job = None
        return value

    def _send(self, job: _Job) -> None:
        with contextlib.suppress(ConnectionError):  # it died idle: reading its answer will tell
            self.pipe.send((job.task, job.deadly))

    def _receive(self) -> Any:
        kind, value = self.pipe.recv()
        if kind == "error":
            raise value
        return value

    def mourn(self) -> _Job:
        """The task of a worker that died, to be done by another."""
        job, item = self.job, self.at.value
        assert job is not None
        self.end()
        code = self.process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        job.deaths[item] += 1
        if job.deaths[item] > 1:
            if item == STARTING or item in job.deadly:
                raise RunError(f"processes that read data end with {how}: is there enough memory?")
            job.deadly[item] = f"a process that reads it ends with {how}"
        return job

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, at: Any, make: Callable[[], Work]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that was started by hand ends all
    parent = multiprocessing.parent_process()

    def begin(item: int) -> None:
        at.value = item
        if parent is not None and not parent.is_alive():
            sys.exit(1)

    try:
        work = make()
        pipe.send(("ready", None))
        while True:
            task, deadly = pipe.recv()
            at.value = STARTING
            pipe.send(("result", work(task, begin, deadly)))
    except EOFError:  # the other end is gone
        return
    except (RequestError, RunError) as error:
        pipe.send(("error", error))
    except Exception as error:
        pipe.send(("error", RunError(f"{type(error).__name__}: {error}")))
