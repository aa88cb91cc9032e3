"""What must be known of demonstrations before a robot is trained on them: which episodes are good, and how the numbers are distributed.

All numbers are read once, and no picture: of videos, that the frames are there. `blm data stats` writes what is found, one file a
robot, whatever the number of sets. Training reads it: windows are numbered by it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath
from tqdm import tqdm

from blm_jax.data.demos.episodes import BadEpisode, Source
from blm_jax.data.demos.observation import OVERSHOOT, check_output
from blm_jax.data.demos.robots import Dimension, Robot, find_robot, load_robots
from blm_jax.data.demos.running import Running
from blm_jax.data.demos.sets import check_layout, chunks, open_set, read_episode
from blm_jax.data.demos.statistics import NARROW, Scheme, Statistics, Summary, check_statistics, from_json, to_json, to_relative
from blm_jax.data.files import open_path, read_json, write_whole
from blm_jax.data.workers import in_order
from blm_jax.errors import RequestError

FORMAT = 1
PIECE = 64  # episodes a task; numbers are added up in the order of pieces, so the sums do not depend on the number of workers
FAR = 10  # half-widths of what 98 % of the values take, beyond which a value is reported
SAID = 5  # bad episodes that a message names


@dataclass(frozen=True)
class Surveyed:
    """One set."""

    path: str
    identity: str
    actions: tuple[int, ...]  # of each episode; 0 of a bad one
    bad: dict[int, str]  # why, by episode


@dataclass(frozen=True)
class Survey:
    """Of all sets of one robot."""

    robot: str  # fingerprint of its entry
    statistics: Statistics
    sets: tuple[Surveyed, ...]
    outliers: tuple[str, ...]  # a sentence each

    @property
    def windows(self) -> int:
        return sum(sum(one.actions) for one in self.sets)

    def of(self, source: Source) -> Surveyed:
        """Of one of its sets, wherever that lies now."""
        found = next((one for one in self.sets if one.identity == source.identity), None)
        if found is None:
            whose = f"the statistics of {self.statistics.robot}"
            raise RequestError(f"{source.path} was changed after {whose} were made, or is none of their sets: make them anew")
        return found


def survey(paths: Sequence[epath.PathLike], robot: Robot, scheme: Scheme = "quantile", workers: int = 0) -> Survey:
    """Read all sets as this robot. `workers` are processes; 0 reads in this one."""
    names = [str(path) for path in paths]
    if len(set(names)) < len(names) or not names:
        raise RequestError("name at least one set, and each once")
    sources = [open_set(name) for name in names]
    for source in sources:
        check_layout(source, robot)
        if source.count == 0:
            raise RequestError(f"{source.path} holds no episode")
    identities = [source.identity for source in sources]  # of what is read from now on
    pieces = [(i, begin) for i, source in enumerate(sources) for begin in range(0, source.count, PIECE)]
    state, action = Running(len(robot.state)), Running(len(robot.action))
    counts: list[list[int]] = [[] for _ in sources]
    bad: list[dict[int, str]] = [{} for _ in sources]
    make = functools.partial(_surveyor, tuple(sources), robot)
    results = in_order(pieces, min(workers, len(pieces)), make)
    with tqdm(total=sum(source.count for source in sources), unit=" episodes", disable=None) as progress:
        for (i, _), found in zip(pieces, results, strict=True):
            counts[i] += found.actions
            bad[i] |= found.bad
            state.merge(found.state)
            action.merge(found.action)
            progress.update(len(found.actions))
    if not action.count:
        first = next(iter(bad[0].items()))
        raise RequestError(f"{names[0]}: no episode can be used; episode {first[0]}: {first[1]}")
    summaries = state.summary(robot.state), action.summary(robot.action)
    statistics = Statistics(robot.name, robot.relative, robot.horizon, scheme, *summaries)
    surveyed = [
        Surveyed(name, identity, tuple(actions), wrong)
        for name, identity, actions, wrong in zip(names, identities, counts, bad, strict=True)
    ]
    outliers = [*_outliers("state", state, summaries[0], sources), *_outliers("action", action, summaries[1], sources)]
    outliers += _beyond_limits("state", state, robot.state, sources)
    if not robot.relative:
        outliers += _beyond_limits("action", action, robot.action, sources)
    return Survey(fingerprint(robot), statistics, tuple(surveyed), tuple(outliers))


# --- a piece -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    actions: list[int]
    bad: dict[int, str]
    state: Running
    action: Running


def _surveyor(sources: Sequence[Source], robot: Robot) -> Callable[[tuple[int, int], Callable[[int], None], Mapping[int, str]], _Found]:
    def work(piece: tuple[int, int], begin: Callable[[int], None], deadly: Mapping[int, str]) -> _Found:
        number, start = piece
        source = sources[number]
        before = sum(one.count for one in sources[:number])
        found = _Found([], {}, Running(len(robot.state)), Running(len(robot.action)))
        for episode in range(start, min(start + PIECE, source.count)):
            begin(episode)
            try:
                if episode in deadly:
                    raise BadEpisode(deadly[episode])
                found.actions.append(_add(source, robot, episode, before + episode, found))
            except BadEpisode as error:
                found.actions.append(0)
                found.bad[episode] = str(error)
        return found

    return work


def _add(source: Source, robot: Robot, number: int, label: int, found: _Found) -> int:
    """Adds what is trained of an episode; the number of its actions."""
    episode = read_episode(source, robot, number)
    for camera in robot.cameras:
        source.check_frames(number, robot.camera_column(camera.name))
    if not any(found.actions):
        _check_sizes(source, robot, number)
    actions, mask = chunks(episode, robot.horizon)
    states = episode.state[: len(actions)]
    found.state.add(states, label)
    found.action.add(to_relative(actions, states, robot)[mask], label)
    return len(actions)


def _check_sizes(source: Source, robot: Robot, number: int) -> None:
    """By the first good episode of a piece: what a set says of its pictures' sizes may be wrong, or nothing."""
    for camera in robot.cameras:
        column = robot.camera_column(camera.name)
        height, width = source.frames(number, column, [0]).shape[1:3]
        if (height, width) != (camera.height, camera.width):
            raise RequestError(
                f"{source.path}, read as robot {robot.name}: pictures {column} of episode {number} are {height}x{width} "
                f"(height x width), camera {camera.name} is {camera.height}x{camera.width}: give the camera the set's size"
            )


# --- what is strange about them ------------------------------------------------------------------------------------------------


def _place(label: int, sources: Sequence[Source]) -> str:
    for source in sources:
        if label < source.count:
            return f"episode {label} of {source.path}"
        label -= source.count
    raise ValueError("no such episode")


def _outliers(what: str, running: Running, summary: Summary, sources: Sequence[Source]) -> Iterator[str]:
    for i, name in enumerate(summary.names):
        low, high = summary.q01[i], summary.q99[i]
        middle, half = (low + high) / 2, (high - low) / 2
        if half <= NARROW * (summary.max[i] - summary.min[i]) / 2:
            continue  # most values are one: there is nothing to measure others with
        for value, label in ((summary.min[i], running.low_at[i]), (summary.max[i], running.high_at[i])):
            if abs(value - middle) > FAR * half:
                yield f"{what} {name} is {value:g} in {_place(int(label), sources)}, while 98 % lie between {low:g} and {high:g}"


def _beyond_limits(what: str, running: Running, dimensions: Sequence[Dimension], sources: Sequence[Source]) -> Iterator[str]:
    for i, dimension in enumerate(dimensions):
        room = OVERSHOOT * (dimension.high - dimension.low)
        for value, label in ((running.low[i], running.low_at[i]), (running.high[i], running.high_at[i])):
            if not dimension.low - room <= value <= dimension.high + room:
                yield (
                    f"{what} {dimension.name} is {value:g} in {_place(int(label), sources)}, outside the robot's limits of "
                    f"{dimension.low:g} to {dimension.high:g} {dimension.unit}: check units and order in columns"
                )


# --- in a file -------------------------------------------------------------------------------------------------------------------


def fingerprint(robot: Robot) -> str:
    """Of all that decides what numbers are read as."""
    return digest(asdict(robot))


def digest(value: Any) -> str:
    """Of what JSON can say; of 3 and 3.0, which are equal, the same."""

    def number(text: str) -> float:
        return float(text) + 0.0  # -0.0 is 0.0

    alike = json.loads(json.dumps(value), parse_int=number, parse_float=number)
    return "sha256:" + hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()


def write_survey(path: epath.PathLike, found: Survey) -> None:
    check_output(path)
    sets = [{**asdict(one), "bad": {str(number): why for number, why in one.bad.items()}} for one in found.sets]
    content = {
        "format": FORMAT,
        "robot": found.robot,
        "statistics": to_json(found.statistics),
        "sets": sets,
        "outliers": list(found.outliers),
    }
    write_whole(open_path(path), json.dumps(content, ensure_ascii=False).encode())


def read_survey(path: epath.PathLike, robot: Robot) -> Survey:
    """What `write_survey` wrote. Refuses the survey of another robot, or of this one as it was."""
    place = open_path(path)
    content = read_json(place)
    if content.get("format") != FORMAT:
        raise RequestError(f"{path} is no survey of format {FORMAT}: make it with `blm data stats`")
    statistics = from_json(content.get("statistics"), str(path))
    check_statistics(statistics, robot)
    if content.get("robot") != fingerprint(robot):
        raise RequestError(f"{path}: the entry of robot {robot.name} was changed since: make the statistics anew")
    try:
        sets = tuple(_surveyed(one) for one in content["sets"])
        outliers = tuple(map(str, content["outliers"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"{path} was edited, or is damaged: make it anew with `blm data stats`") from error
    return Survey(content["robot"], statistics, sets, outliers)


def _surveyed(value: Mapping[str, Any]) -> Surveyed:
    actions = tuple(value["actions"])
    if not all(type(count) is int and count >= 0 for count in actions):
        raise ValueError("counts of actions")
    return Surveyed(str(value["path"]), str(value["identity"]), actions, {int(number): str(why) for number, why in value["bad"].items()})


# --- the command -----------------------------------------------------------------------------------------------------------------


def stats(sets: Sequence[str], robot: str, robots_files: Sequence[str], scheme: Scheme, workers: int, out: str) -> dict[str, Any]:
    """`blm data stats`."""
    check_output(out)
    entry = find_robot(robot, load_robots(robots_files))
    found = survey(sets, entry, scheme, workers)
    write_survey(out, found)
    return {
        "out": out,
        "robot": robot,
        "episodes": sum(len(one.actions) for one in found.sets),
        "windows": found.windows,
        "fingerprint": found.statistics.fingerprint,
        "bad": [{"set": one.path, "episode": number, "reason": why} for one in found.sets for number, why in one.bad.items()],
        "outliers": list(found.outliers),
    }


def report(result: Mapping[str, Any]) -> str:
    """What `stats` found, to be read."""
    bad = result["bad"]
    lines = [f"{result['out']}: {result['windows']} windows of {result['episodes']} episodes, {len(bad)} of them bad"]
    lines += [f"bad: {one['set']}, episode {one['episode']}: {one['reason']}" for one in bad[:SAID]]
    lines += [f"and {len(bad) - SAID} more bad episodes, in {result['out']}"] if len(bad) > SAID else []
    return "\n".join([*lines, *(f"look: {outlier}" for outlier in result["outliers"])])
