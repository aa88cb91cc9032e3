"""Where a run's wall time went, over all its starts; and profiles of chosen steps."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from etils import epath

from blm_jax.data.files import open_path, read_json, write_whole
from blm_jax.weights.safetensors_file import is_local

FILE, PROFILE = "goodput.json", "profile"

# `step` is time in steps that were done for the first time; in steps that a restart has done again, `repeated`. `other` is between all.
Part = Literal["start", "compile", "restore", "data", "step", "repeated", "save", "eval", "other"]
PARTS: tuple[Part, ...] = ("start", "compile", "restore", "data", "step", "repeated", "save", "eval", "other")


class Clock:
    """Every second since it was made belongs to one part: what is timed within another part is taken from it.

    Of what happens on the devices meanwhile it knows nothing: `data` is how long the host waited.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.furthest = 0  # the last step that was told in any earlier start: up to it, steps are repeated
        self.starts = 1
        self._now, self._last = now, now()
        self._inside: list[Part] = []
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def time(self, part: Part) -> Iterator[None]:
        self._settle()
        self._inside.append(part)
        try:
            yield
        finally:
            self._settle()
            self._inside.pop()

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Steps are numbered by how many are done after them."""
        return self.time("repeated" if number <= self.furthest else "step")

    def seconds(self) -> dict[Part, float]:
        """Up to now, what still runs included."""
        self._settle()
        return dict(self._seconds)

    def goodput(self) -> float:
        """The share of all time in steps that count."""
        seconds = self.seconds()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def report(self) -> dict[str, Any]:
        seconds = self.seconds()
        wall = sum(seconds.values())
        shares = {part: spent / max(wall, 1e-9) for part, spent in seconds.items()}
        return {"goodput": shares["step"], "wall_seconds": wall, "starts": self.starts, "furthest": self.furthest, "shares": shares}

    def line(self) -> str:
        report = self.report()
        parts = ", ".join(f"{part} {share:.1%}" for part, share in report["shares"].items() if share >= 5e-4)
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        return f"goodput {report['goodput']:.1%} of {report['wall_seconds']:.0f} s{starts}: {parts}"

    def _settle(self) -> None:
        now = self._now()
        self._seconds[self._inside[-1] if self._inside else "other"] += now - self._last
        self._last = now

    # --- over restarts ---

    def read(self, run: epath.PathLike) -> None:
        """Go on from what an earlier start of the run has kept. Time after it was last kept, up to a kill, is not known."""
        path = open_path(run) / FILE
        if not path.exists():
            return
        kept = read_json(path)
        for part, seconds in kept["seconds"].items():
            self._seconds[part] += seconds
        self.starts += kept["starts"]
        self.furthest = max(self.furthest, kept["furthest"])

    def write(self, run: epath.PathLike, step: int) -> None:
        """Process 0 does. `step` is the last one told."""
        kept = {"starts": self.starts, "furthest": max(step, self.furthest), "seconds": self.seconds()}
        write_whole(open_path(run) / FILE, json.dumps(kept, indent=1).encode() + b"\n")


class Profile:
    """A profile of the steps from steps[0] up to and without steps[1], for xprof and TensorBoard, under RUN/profile."""

    def __init__(self, run: epath.PathLike, steps: Sequence[int]):
        self.directory = open_path(run) / PROFILE
        self._steps = range(*steps) if steps else range(0)
        self._local: Path | None = None  # where the profiler is writing

    def before(self, step: int) -> None:
        if step not in self._steps or self._local is not None:
            return
        import jax

        # The profiler knows local paths only.
        self._local = Path(self.directory if is_local(self.directory) else tempfile.mkdtemp(prefix="blm_profile_"))
        jax.profiler.start_trace(str(self._local))

    def after(self, step: int, results: Any) -> None:
        """`results` of the step: it is over when they are there."""
        if self._local is not None and step + 1 not in self._steps:
            import jax

            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """A profile that was begun is kept, wherever the run ends."""
        if self._local is None:
            return
        import jax

        local, self._local = self._local, None
        jax.profiler.stop_trace()
        if not is_local(self.directory):
            copy_up(local, self.directory)
            shutil.rmtree(local)


def copy_up(local: Path, target: epath.Path) -> None:
    """The files of a directory of this machine, to a bucket."""
    for file in sorted(local.rglob("*")):
        if file.is_file():
            write_whole(target / file.relative_to(local).as_posix(), file.read_bytes())
