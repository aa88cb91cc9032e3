"""What a policy sees of demonstrations: numbers in the robot's units beside its limits, pictures, and the chunk that a window holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from blm_jax.config import Instruction
from blm_jax.data import page, prompt_view
from blm_jax.data.demos.demonstrations import Window, read_window
from blm_jax.data.demos.episodes import BadEpisode, Source
from blm_jax.data.demos.observation import encode
from blm_jax.data.demos.robots import Dimension, Robot
from blm_jax.data.demos.sets import Episode, read_episode, read_pictures
from blm_jax.data.demos.survey import SAID, Survey
from blm_jax.data.page import printable
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.prompt_view import Stretch

FRAMES = 7  # of a camera
MOST_READ = 256  # episodes whose numbers are read to know how long episodes are, where no survey knows it
CHUNK_SHARE = 0.75  # of the chunk that is shown, what lies before the episode's end: so that the mask is seen too
BEYOND = "!"  # behind a number that the robot's limits do not hold


@dataclass(frozen=True)
class Values:
    """One dimension of an episode."""

    dimension: Dimension
    values: np.ndarray  # [steps] float64

    @property
    def low(self) -> float:
        return float(self.values.min())

    @property
    def high(self) -> float:
        return float(self.values.max())

    def beyond(self, value: float) -> bool:
        """Past the limits, by more than the rounding to the float32 that sets hold."""
        limits = np.array([self.dimension.low, value, self.dimension.high]).astype(np.float32)
        return not limits[0] <= limits[1] <= limits[2]

    def summary(self) -> dict[str, Any]:
        beyond = self.beyond(self.low) or self.beyond(self.high)
        limits = [self.dimension.low, self.dimension.high]
        return {"unit": self.dimension.unit, "min": self.low, "max": self.high, "limits": limits, "beyond": beyond}


@dataclass(frozen=True)
class Line:
    """What shares name and unit: a dimension of the state, of the action, or of both."""

    state: Values | None
    action: Values | None

    @property
    def dimension(self) -> Dimension:
        found = self.state or self.action
        assert found is not None
        return found.dimension


@dataclass(frozen=True)
class Shown:
    """An episode as a policy gets it."""

    number: int
    episode: Episode
    lines: tuple[Line, ...]
    steps: list[int]  # whose pictures there are
    frames: dict[str, np.ndarray]  # by camera, [steps, height, width, 3] uint8
    window: Window
    prompt: tuple[Example, list[Stretch]] | None  # of the window, where there is an engine

    @property
    def instructions(self) -> list[str]:
        """The different ones, in their order."""
        return list(dict.fromkeys(self.episode.instructions[: len(self.episode.action)]))


@dataclass(frozen=True)
class ShownBad:
    number: int
    reason: str


@dataclass(frozen=True)
class Overview:
    """Of the episodes of a set, or of some of them."""

    total: int
    read: int
    lengths: np.ndarray  # actions of the good ones
    bad: dict[int, str]  # why, by episode


# --- reading -------------------------------------------------------------------------------------------------------------


def overview(source: Source, robot: Robot, survey: Survey | None, shown: Sequence[Shown | ShownBad]) -> Overview:
    """Of the survey, or else of numbers that are read. `shown` episodes were looked at more closely: what is bad of them is."""
    bad = {one.number: one.reason for one in shown if isinstance(one, ShownBad)}
    if survey is not None:
        found = survey.of(source)
        lengths = [count for number, count in enumerate(found.actions) if count and number not in bad]
        return Overview(source.count, source.count, np.array(lengths, np.int64), dict(sorted({**found.bad, **bad}.items())))
    lengths, chosen = [], sorted({*page.spread(source.count, MOST_READ), *(one.number for one in shown)})
    for number in tqdm(chosen, unit=" episodes", disable=None):
        try:
            if number not in bad:
                lengths.append(len(read_episode(source, robot, number).action))
        except BadEpisode as error:
            bad[number] = str(error)
    return Overview(source.count, len(chosen), np.array(lengths, np.int64), dict(sorted(bad.items())))


def look(source: Source, robot: Robot, number: int, engine: PromptEngine | None, instruction: Instruction) -> Shown | ShownBad:
    try:
        return _look(source, robot, number, engine, instruction)
    except BadEpisode as error:
        return ShownBad(number, str(error))


def _look(source: Source, robot: Robot, number: int, engine: PromptEngine | None, instruction: Instruction) -> Shown:
    """Raises BadEpisode."""
    episode = read_episode(source, robot, number)
    steps = page.spread(len(episode.state), FRAMES)
    frames = {}
    for camera in robot.cameras:
        source.check_frames(number, robot.camera_column(camera.name))
        frames[camera.name] = read_pictures(source, robot, number, camera.name, steps)
    window = read_window(source, robot, number, max(0, len(episode.action) - max(1, int(CHUNK_SHARE * robot.horizon))))
    prompt = None
    if engine is not None:
        example = encode(window.observation, robot, engine, instruction)
        prompt = example, prompt_view.stretches(example, engine)
    return Shown(number, episode, tuple(_lines(episode, robot)), steps, frames, window, prompt)


def _lines(episode: Episode, robot: Robot) -> list[Line]:
    states, actions = (
        {(dimension.name, dimension.unit): Values(dimension, values[:, i]) for i, dimension in enumerate(dimensions)}
        for dimensions, values in ((robot.state, episode.state), (robot.action, episode.action))
    )
    return [Line(states.get(key), actions.get(key)) for key in dict.fromkeys([*states, *actions])]


# --- in words ------------------------------------------------------------------------------------------------------------


def headline(source: Source, robot: Robot, found: Overview) -> str:
    some = "" if found.read == found.total else f", of which {found.read} were read"
    bad = f", {len(found.bad)} bad" if found.bad else ""
    what = "episode" if found.total == 1 else "episodes"
    return f"{source.path}: {found.total} {what} of robot {robot.name}{some}{bad}"


def bad_lines(found: Overview) -> list[str]:
    lines = [f"bad: episode {number}: {printable(why)}" for number, why in list(found.bad.items())[:SAID]]
    return [*lines, f"and {len(found.bad) - SAID} more bad episodes"] if len(found.bad) > SAID else lines


def lengths_line(found: Overview) -> str:
    return f"steps an episode: {page.in_words(found.lengths)}"


def about(shown: Shown, robot: Robot) -> str:
    """How long, and what the task is."""
    count, texts = len(shown.episode.action), shown.instructions
    more = f", and {len(texts) - 1} more instructions" if len(texts) > 1 else ""
    said = printable(texts[0]).replace("\n", "\\n")
    return f'{count} steps, {count / robot.hz:.3g} s at {robot.hz:g} Hz, "{said}"{more}'


def cameras(robot: Robot) -> str:
    sizes = ", ".join(f"{camera.name} {camera.height}x{camera.width} ({robot.camera_column(camera.name)})" for camera in robot.cameras)
    return f"cameras, height x width: {sizes}"


HEADS = ("dimension", "unit", "state min", "max", "action min", "max", "limits")


def table(shown: Shown) -> list[tuple[str, ...]]:
    """The cells of `HEADS`, a row a dimension."""
    return [(line.dimension.name, line.dimension.unit, *_range(line.state), *_range(line.action), _limits(line)) for line in shown.lines]


def _range(values: Values | None) -> tuple[str, str]:
    if values is None:
        return "", ""
    low, high = (f"{value:.4g}{BEYOND if values.beyond(value) else ''}" for value in (values.low, values.high))
    return low, high


def _limits(line: Line) -> str:
    known = [values.dimension for values in (line.state, line.action) if values is not None]
    return ", ".join(dict.fromkeys(f"{one.low:g} .. {one.high:g}" for one in known))


def as_text(source: Source, robot: Robot, found: Overview, shown: Sequence[Shown | ShownBad]) -> str:
    blocks = ["\n".join([headline(source, robot, found), cameras(robot), *bad_lines(found)])]
    if len(found.lengths):
        blocks.append(f"{lengths_line(found)}\n{page.bars(found.lengths)}")
    for one in shown:
        if isinstance(one, ShownBad):
            blocks.append(f"episode {one.number} is bad: {printable(one.reason)}")
            continue
        blocks.append(f"episode {one.number}: {about(one, robot)}\n{_aligned([HEADS, *table(one)])}")
        if one.prompt is not None:
            example, stretches = one.prompt
            head = f"what the model reads at step {one.window.step}, {len(example.tokens)} tokens"
            blocks.append(f"{head}\n{prompt_view.as_text(stretches).strip()}")
    if any(BEYOND in cell for one in shown if isinstance(one, Shown) for row in table(one) for cell in row):
        blocks.append(f"{BEYOND} beyond the robot's limits: check units and order in columns")
    return "\n\n".join(blocks)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right, the marks behind them beside each other."""
    padded = [[*row[:2], *(cell if cell.endswith(BEYOND) else f"{cell} " for cell in row[2:6]), row[6]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    lines = []
    for row in padded:
        cells = [cell.rjust(width) if 2 <= i < 6 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + " ".join(cells).rstrip())
    return "\n".join(lines)


def summary(source: Source, robot: Robot, found: Overview, shown: Sequence[Shown | ShownBad]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "set": str(source.path),
        "robot": robot.name,
        "hz": robot.hz,
        "cameras": {camera.name: [camera.height, camera.width] for camera in robot.cameras},
        "episodes": found.total,
        "read": found.read,
        "bad": [{"episode": number, "reason": why} for number, why in found.bad.items()],
        "lengths": page.histogram(found.lengths) if len(found.lengths) else [],
        "shown": [_summary(one) for one in shown],
    }


def _summary(one: Shown | ShownBad) -> dict[str, Any]:
    if isinstance(one, ShownBad):
        return {"episode": one.number, "bad": one.reason}
    result: dict[str, Any] = {"episode": one.number, "steps": len(one.episode.action), "instructions": one.instructions}
    for what in ("state", "action"):
        values = [getattr(line, what) for line in one.lines]
        result[what] = {each.dimension.name: each.summary() for each in values if each is not None}
    if one.prompt is not None:
        example, stretches = one.prompt
        result["prompt"] = {"step": one.window.step, "tokens": len(example.tokens), "text": prompt_view.as_text(stretches)}
    return result
