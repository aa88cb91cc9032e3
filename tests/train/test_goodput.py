"""Where the wall time of a run went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from blm_jax.train.goodput import Clock, Profile
from tests.data import bucket


class Time:
    """Seconds pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def begin(time: Time, run: Path) -> Clock:
    clock = Clock(time)
    clock.read(run)
    return clock


def spent(clock: Clock) -> dict[str, float]:
    return {part: seconds for part, seconds in clock.seconds().items() if seconds}


def test_every_second_belongs_to_one_part(time: Time) -> None:
    clock = Clock(time)
    time.sleep(1)
    with clock.time("start"):
        time.sleep(2)
        with clock.time("restore"):
            time.sleep(4)
        time.sleep(8)
    with clock.step(1), clock.time("data"):
        time.sleep(16)
    with clock.step(2):
        time.sleep(32)
        assert spent(clock) == {"other": 1, "start": 10, "restore": 4, "data": 16, "step": 32}  # what still runs included
        time.sleep(64)
    assert spent(clock) == {"other": 1, "start": 10, "restore": 4, "data": 16, "step": 96}
    assert clock.goodput() == pytest.approx(96 / 127)
    assert sum(clock.report()["shares"].values()) == pytest.approx(1)


def test_a_part_that_fails_is_over(time: Time) -> None:
    clock = Clock(time)
    with pytest.raises(KeyError), clock.time("save"):
        time.sleep(3)
        raise KeyError
    time.sleep(5)
    assert spent(clock) == {"save": 3, "other": 5}


def test_steps_that_are_done_again_are_lost(time: Time, tmp_path: Path) -> None:
    """Killed after step 7, of which the log had told, with the checkpoint of step 4: 5, 6 and 7 count once."""
    clock = begin(time, tmp_path)
    for number in range(1, 8):
        with clock.step(number):
            time.sleep(10)
    clock.write(tmp_path, 7)
    time.sleep(1000)  # between the starts nothing runs
    clock = begin(time, tmp_path)
    assert clock.furthest == 7
    with clock.time("restore"):
        time.sleep(20)
    for number in range(5, 10):
        with clock.step(number):
            time.sleep(10)
    assert spent(clock) == {"step": 90, "repeated": 30, "restore": 20}
    report = clock.report()
    assert (report["goodput"], report["wall_seconds"], report["starts"]) == (pytest.approx(90 / 140), 140, 2)
    assert clock.line() == "goodput 64.3% of 140 s in 2 starts: restore 14.3%, step 64.3%, repeated 21.4%"
    clock.write(tmp_path, 9)
    clock = begin(time, tmp_path)
    assert (clock.starts, clock.furthest, spent(clock)) == (3, 9, {"step": 90, "repeated": 30, "restore": 20})
    clock.write(tmp_path, 4)  # killed once more, before it was as far
    assert begin(time, tmp_path).furthest == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goodput.json"]


def test_a_run_without_a_past(time: Time, tmp_path: Path) -> None:
    clock = begin(time, tmp_path / "none")
    assert (clock.starts, clock.furthest, spent(clock)) == (1, 0, {})
    assert clock.goodput() == 0


def test_it_is_kept_in_a_bucket(time: Time, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bucket.use(monkeypatch, tmp_path)
    clock = Clock(time)
    with clock.step(1):
        time.sleep(2)
    clock.write(f"{bucket.ROOT}/run", 1)
    assert json.loads(place.objects["bucket/run/goodput.json"])["furthest"] == 1
    again = Clock(time)
    again.read(f"{bucket.ROOT}/run")
    assert spent(again) == {"step": 2}


# --- profiles --------------------------------------------------------------------------------------------------------------


class Profiler:
    """In place of jax.profiler, which takes seconds: it notes the steps it saw."""

    def __init__(self) -> None:
        self.traces: list[tuple[str, list[int]]] = []
        self.on = False

    def start_trace(self, directory: str) -> None:
        assert not self.on
        self.on = True
        self.traces.append((directory, []))

    def stop_trace(self) -> None:
        assert self.on
        self.on = False
        trace = Path(self.traces[-1][0]) / "plugins" / "host.xplane.pb"
        trace.parent.mkdir(parents=True)
        trace.write_bytes(b"trace")


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Profiler]:
    found = Profiler()
    monkeypatch.setattr(jax, "profiler", found)
    yield found
    assert not found.on


def go(profile: Profile, profiler: Profiler, steps: range) -> None:
    for step in steps:
        profile.before(step)
        if profiler.on:
            profiler.traces[-1][1].append(step)
        profile.after(step, jnp.zeros(()))


@pytest.mark.parametrize(
    ("asked", "steps", "seen"),
    [
        ((3, 5), range(1, 9), [3, 4]),
        ((3, 4), range(1, 9), [3]),
        ((3, 9), range(5, 7), [5, 6]),
        ((1, 3), range(4, 6), None),
        ((), range(1, 4), None),
    ],
    ids=["two steps", "one step", "begun and ended within", "over before", "none"],
)
def test_profile(tmp_path: Path, profiler: Profiler, asked: tuple[int, ...], steps: range, seen: list[int] | None) -> None:
    profile = Profile(tmp_path, asked)
    go(profile, profiler, steps)
    profile.close()
    assert profiler.traces == ([] if seen is None else [(str(tmp_path / "profile"), seen)])
    assert (tmp_path / "profile/plugins/host.xplane.pb").exists() == (seen is not None)


def test_a_profile_goes_to_a_bucket(tmp_path: Path, profiler: Profiler, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bucket.use(monkeypatch, tmp_path)
    go(Profile(f"{bucket.ROOT}/run", (2, 3)), profiler, range(1, 4))
    assert place.objects == {"bucket/run/profile/plugins/host.xplane.pb": b"trace"}
    assert not Path(profiler.traces[0][0]).exists()


def test_the_profiler_itself(tmp_path: Path) -> None:
    """Once for real: what xprof reads is there."""
    profile = Profile(tmp_path, (1, 2))
    profile.before(1)
    profile.after(1, jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
    assert [file for file in (tmp_path / "profile").rglob("*.xplane.pb") if file.stat().st_size > 100]
