"""What a run tells: numbers by step in RUN/log.jsonl and RUN/tensorboard, elsewhere if asked, and a line for who watches.

journal = Journal(run, begun=step, total=steps, every=10, clock=clock)
for step in ...:
    state, values = train_step(state, batch)
    journal.log(step, values, work)      # fetches the values of the step before, while this one runs
journal.close()
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import secrets
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from blm_jax.data.files import open_path, write_whole
from blm_jax.errors import RequestError
from blm_jax.train.events import EventFile
from blm_jax.train.goodput import Clock, copy_up
from blm_jax.train.work import StepWork
from blm_jax.weights.safetensors_file import is_local

LOG, TENSORBOARD, WANDB_ID = "log.jsonl", "tensorboard", "wandb_id.txt"
LAG = 1  # steps: the host goes on so far while values are computed
UPLOAD_SECONDS = 60.0  # between two copies of the journal to a bucket, where nothing can be appended

Row = dict[str, float | int | None]


class _Pending(NamedTuple):
    step: int
    values: Mapping[str, Any]
    work: StepWork


class _Since:
    """What was done since the last row."""

    def __init__(self, clock: Clock):
        self.steps = self.rows = self.tokens = self.needed = self.computed = 0
        self.before = clock.seconds()

    def add(self, work: StepWork) -> None:
        self.steps += 1
        self.rows += work.rows
        self.tokens += work.tokens
        self.needed += work.needed
        self.computed += work.needed + work.repeated

    def speeds(self, clock: Clock, peak: float | None) -> Row:
        """Of steps, what the host does beside them, and their wait for data: saves and evaluations have shares of their own."""
        spent = {part: seconds - self.before[part] for part, seconds in clock.seconds().items()}
        seconds = max(spent["step"] + spent["repeated"] + spent["data"] + spent["other"], 1e-9)
        speeds: Row = {
            "seconds_per_step": seconds / self.steps,
            "rows_per_second": self.rows / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": spent["data"] / seconds,
        }
        if peak is not None:
            speeds |= {"mfu": self.needed / seconds / peak, "hfu": self.computed / seconds / peak}
        return speeds | {"goodput": clock.goodput()}


class Journal:
    """Process 0 writes and shows; the others only wait for their step, so that no host runs ahead of its devices.

    A value is a scalar, or a pair (sum, weight) whose quotient is told; of vectors, `kinds` names the entries:
    {"action/robot": ["panda", ...]} makes "action/robot/panda". What weighs nothing was not seen, and is left out.
    """

    def __init__(
        self,
        run: epath.PathLike,
        *,
        begun: int,
        total: int,
        every: int,
        clock: Clock,
        kinds: Mapping[str, Sequence[str]] | None = None,
        peak: float | None = None,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        process: int = 0,
    ):
        self.last: Row = {}  # the last row
        self._total, self._every, self._clock, self._peak = total, every, clock, peak
        self._kinds = kinds or {}
        self._pending: deque[_Pending] = deque()
        self._since = _Since(clock)
        self._files = self._wandb = self._display = None
        if process == 0:
            self._wandb = _start_wandb(wandb, open_path(run), config) if wandb else None
            self._files = _Files(open_path(run), begun)
            clock.furthest = max(clock.furthest, self._files.furthest)
            self._display = _Display(begun, total)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # A step that failed has no values; what was told before it is kept all the same.
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            self.flush()
        self._end()

    def log(self, step: int, values: Mapping[str, Any], work: StepWork) -> None:
        """After the step was given to the devices. Returns when the step before it is done, and has told its values."""
        for leaf in jax.tree.leaves(values) if self._tells(step) else ():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._pending.append(_Pending(step, values, work))
        while len(self._pending) > LAG:
            self._settle(self._pending.popleft())

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of the host, such as an evaluation's, in a row of their own."""
        self.flush()
        row: Row = {"step": step, **{name: _number(value) for name, value in values.items()}}
        self._write(row | {"time": round(time.time(), 3)})
        if self._display is not None:
            self._display.say(row)

    def flush(self) -> None:
        """Everything told so far is in the files."""
        while self._pending:
            self._settle(self._pending.popleft())
        if self._files is not None:
            self._files.keep(self._clock)
            self._files.upload()

    def close(self) -> None:
        self.flush()
        self._end()

    def _end(self) -> None:
        self._pending.clear()
        for part in (self._display, self._files):
            if part is not None:
                part.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._files = self._wandb = self._display = None

    def _tells(self, step: int) -> bool:
        return step % self._every == 0 or step == self._total

    def _settle(self, pending: _Pending) -> None:
        with self._clock.step(pending.step):
            jax.block_until_ready(pending.values)
        self._since.add(pending.work)
        told = self._tells(pending.step)
        if told:
            self.last = {"step": pending.step, **self._fetched(pending.values), **self._since.speeds(self._clock, self._peak)}
            self._write(self.last | {"time": round(time.time(), 3)})
            self._since = _Since(self._clock)
        if self._display is not None:
            self._display.show(self.last if told else {})

    def _fetched(self, values: Mapping[str, Any]) -> Row:
        row: Row = {}
        for name, value in jax.device_get(dict(values)).items():
            total, weight = value if isinstance(value, tuple) else (value, np.ones_like(value))
            names = [f"{name}/{kind}" for kind in self._kinds[name]] if np.ndim(total) else [name]
            for key, one, by in zip(names, np.ravel(total), np.ravel(weight), strict=True):
                if by:
                    row[key] = _number(one / by if isinstance(value, tuple) else one)
        return row

    def _write(self, row: Row) -> None:
        if self._files is not None:
            self._files.write(row, self._clock)
        if self._wandb is not None:
            self._wandb.log(_plain(row))


def _number(value: Any) -> float | int | None:
    """As short as it can be read back; JSON knows no NaN."""
    value = np.asarray(value)[()]
    if isinstance(value, np.integer | np.bool_):
        return int(value)
    return float(str(value)) if math.isfinite(value) else None


def _plain(row: Row) -> dict[str, float | int]:
    return {name: math.nan if value is None else value for name, value in row.items()}


# --- files -----------------------------------------------------------------------------------------------------------------


class _Files:
    """The log and the event file: in the run's directory, or in one of this machine's that is copied to the run's bucket."""

    def __init__(self, run: epath.Path, begun: int):
        self._run = run
        self._local = Path(run) if is_local(run) else Path(tempfile.mkdtemp(prefix="blm_journal_"))
        self._local.mkdir(parents=True, exist_ok=True)
        if not is_local(run) and (run / LOG).exists():
            (self._local / LOG).write_bytes((run / LOG).read_bytes())
        self.furthest = cut(self._local / LOG, begun)
        self._log = (self._local / LOG).open("ab", buffering=0)
        self._events = EventFile(self._local / TENSORBOARD, begun + 1 if begun else 0)
        self._uploaded = time.monotonic()

    def keep(self, clock: Clock) -> None:
        clock.write(self._local, self.furthest)

    def write(self, row: Row, clock: Clock) -> None:
        self._log.write(json.dumps(row).encode() + b"\n")
        step = int(row["step"] or 0)
        self._events.write(
            step, {name: math.nan if value is None else value for name, value in row.items() if name not in ("step", "time")}
        )
        self.furthest = max(self.furthest, step)
        self.keep(clock)
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        if is_local(self._run):
            return
        self._uploaded = time.monotonic()
        try:
            copy_up(self._local, self._run)
        except RequestError as error:  # no reason to end a run that goes on: all is still here
            print(f"blm: {error}; it is tried again, the journal is in {self._local}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._log.close()
        self._events.close()
        if not is_local(self._run):
            copy_up(self._local, self._run)
            shutil.rmtree(self._local)


def cut(log: Path, begun: int) -> int:
    """Leave of a log what a run has told up to step `begun`: then it reads as one run. -> the furthest step it told of."""
    if not log.exists():
        return 0
    found = log.read_bytes()
    rows = [(line, _read(line)) for line in found.splitlines(keepends=True)]
    kept = b"".join(line for line, step in rows if step is not None and step <= begun)
    if kept != found:
        write_whole(epath.Path(log), kept)
    return max((step for _, step in rows if step is not None), default=0)


def _read(line: bytes) -> int | None:
    """The step of a whole line. None for one that a kill has torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row["step"] if whole else None


def _start_wandb(project: str, run: epath.Path, config: Mapping[str, Any] | None) -> Any:
    """The same run there after every restart."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise RequestError("log.wandb is set, but wandb is not installed: pip install 'blm-jax[wandb]', or leave it empty") from None
    identity = run / WANDB_ID
    if not identity.exists():
        write_whole(identity, secrets.token_hex(8).encode())
    started = wandb.init(project=project, name=run.name, id=identity.read_text().strip(), resume="allow", config=dict(config or {}))
    started.define_metric("*", step_metric="step")  # its own count cannot go back to a checkpoint
    return started


# --- who watches -----------------------------------------------------------------------------------------------------------

SHOWN = (  # name in a row, name on the screen, how
    ("loss", "loss", "{:.4f}"),
    ("action", "action", "{:.4f}"),
    ("future", "future", "{:.4f}"),
    ("learning_rate", "rate", "{:.2e}"),
    ("slope_norm", "slope norm", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("data_wait", "data wait", "{:.1%}"),
)


class _Display:
    """A bar on a terminal; elsewhere a line a row."""

    def __init__(self, begun: int, total: int):
        self._total = total
        self._bar = tqdm(total=total, initial=begun, unit="step", dynamic_ncols=True, file=sys.stderr) if sys.stderr.isatty() else None

    def show(self, row: Row) -> None:
        """After each step; `row` if it is told."""
        if self._bar is not None:
            if row:
                self._bar.set_postfix_str(describe(row), refresh=False)
            self._bar.update(1)
        elif row:
            left = max(self._total - int(row["step"] or 0), 0) * float(row["seconds_per_step"] or 0)
            self._line(row, f"{describe(row)}  ETA {tqdm.format_interval(left)}")

    def say(self, row: Row) -> None:
        """A row of its own."""
        self._line(row, "  ".join(f"{name} {value:.5g}" for name, value in _plain(row).items() if name != "step"))

    def _line(self, row: Row, text: str) -> None:
        tqdm.write(f"step {row['step']}/{self._total}  {text}", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def describe(row: Row) -> str:
    found = [(shown, form, row[name]) for name, shown, form in SHOWN if name in row]
    return "  ".join(f"{shown} {'nan' if value is None else form.format(value)}" for shown, form, value in found)
