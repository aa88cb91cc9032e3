"""Demonstrations on a page: curves of every dimension, filmstrips, and the chunk of one window as a policy learns it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from blm_jax.config import EmbodimentConfig, PolicyConfig
from blm_jax.data import page, prompt_view
from blm_jax.data.demos import inspect_episodes as words
from blm_jax.data.demos.demonstrations import Window, training_rows
from blm_jax.data.demos.episodes import Source
from blm_jax.data.demos.inspect_episodes import Line, Overview, Shown, ShownBad
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.statistics import Statistics
from blm_jax.data.page import printable
from blm_jax.data.prompt import PromptEngine

WIDE, TALL, EDGE = 300, 110, 18  # of a plot, and what is left above and below the curves
SIDE = 224  # longest side of a frame in a filmstrip
STYLE = """
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 } td:first-child, th:first-child { text-align: left }
td, th { padding: 1px 8px; text-align: right; border-bottom: 1px solid #eee }
.past { color: #aaa } .beyond { background: #f6d5d0 } .scroll { overflow-x: auto } .strip { white-space: nowrap; overflow-x: auto }
polyline { fill: none; stroke-width: 1.3 } line { stroke: #999; stroke-dasharray: 4 3 }
.state { stroke: #5b8bb2 } .action { stroke: #d98a3d }
i { display: inline-block; width: 1.5em; height: .6em } i.state { background: #5b8bb2 } i.action { background: #d98a3d }
"""
KEY = '<p><i class="state"></i> state, <i class="action"></i> action, in the robot\'s units over steps; its limits are dashed</p>'


def write_page(
    directory: str,
    source: Source,
    robot: Robot,
    found: Overview,
    shown: Sequence[Shown | ShownBad],
    statistics: Statistics | None,
    engine: PromptEngine | None,
) -> str:
    lines = [words.headline(source, robot, found), words.cameras(robot), *words.bad_lines(found)]
    body = [f"<p>{'<br>'.join(map(html.escape, lines))}</p>"]
    if len(found.lengths):
        body.append(f"<p>{html.escape(words.lengths_line(found))}</p>{page.drawing(found.lengths)}")
    body += [_bad(one) if isinstance(one, ShownBad) else _section(one, robot, statistics, engine) for one in shown]
    return page.write_page(directory, str(source.path), body, STYLE)


def _bad(one: ShownBad) -> str:
    return f'<section>{_title(one.number)}<p class="beyond">Bad: {html.escape(printable(one.reason))}</p></section>'


def _title(number: int) -> str:
    return f'<h2 id="episode-{number}">Episode {number}</h2>'


def _section(one: Shown, robot: Robot, statistics: Statistics | None, engine: PromptEngine | None) -> str:
    parts = [_title(one.number), f"<p>{html.escape(words.about(one, robot))}</p>", _ranges(one), KEY, *map(plot, one.lines)]
    parts += [_strip(camera, one.steps, frames) for camera, frames in one.frames.items()]
    parts.append(_window(one.window, robot, statistics))
    if one.prompt is not None and engine is not None:
        example, stretches = one.prompt
        parts.append(f"<h3>What the model reads at step {one.window.step}</h3><p>{len(example.tokens)} tokens</p>")
        parts.append(prompt_view.as_html(stretches, example, engine.pixels))
    return f"<section>{''.join(parts)}</section>"


def _ranges(one: Shown) -> str:
    rows = [[(cell.rstrip(words.BEYOND), "beyond" if cell.endswith(words.BEYOND) else "") for cell in row] for row in words.table(one)]
    return _table(words.HEADS, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Of cells with their classes."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    lines = []
    for row in rows:
        cells = [f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>" for text, kind in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


# --- curves --------------------------------------------------------------------------------------------------------------


def plot(line: Line) -> str:
    """A dimension over steps, state and action one above the other, between the robot's limits at least."""
    curves = {what: values for what, values in (("state", line.state), ("action", line.action)) if values is not None}
    limits = sorted({side for one in curves.values() for side in (one.dimension.low, one.dimension.high)})
    low, high = min(limits[0], *(one.low for one in curves.values())), max(limits[-1], *(one.high for one in curves.values()))

    def height(value: float) -> float:
        return EDGE + TALL * (high - value) / (high - low)

    longest = max(len(one.values) for one in curves.values())
    drawn = [f'<line x1="0" y1="{height(limit):.1f}" x2="{WIDE}" y2="{height(limit):.1f}"/>' for limit in limits]
    for what, one in curves.items():
        points = " ".join(f"{WIDE * i / max(1, longest - 1):.1f},{height(one.values[i]):.1f}" for i in _kept(one.values))
        drawn.append(f'<polyline class="{what}" points="{points}"/>')
    drawn.append(f'<text x="{WIDE + 4}" y="{EDGE + 4}">{high:.4g}</text><text x="{WIDE + 4}" y="{EDGE + TALL + 4}">{low:.4g}</text>')
    drawn.append(f'<text x="0" y="{TALL + 2 * EDGE - 3}">0</text><text x="{WIDE}" y="{TALL + 2 * EDGE - 3}">{longest - 1}</text>')
    caption = f"{html.escape(line.dimension.name)}, {line.dimension.unit}"
    svg = f'<svg width="{WIDE + 60}" height="{TALL + 2 * EDGE}" role="img">{"".join(drawn)}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _kept(values: np.ndarray) -> Sequence[int]:
    """Steps that are drawn: of more than are seen, the lowest and the highest of each stretch, so that no peak is lost."""
    steps = np.arange(len(values))
    if len(values) <= 2 * WIDE:
        return steps.tolist()
    found = {0, len(values) - 1}
    for part in np.array_split(steps, WIDE):
        found |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return sorted(found)


# --- pictures and chunks -------------------------------------------------------------------------------------------------


def _strip(camera: str, steps: Sequence[int], frames: np.ndarray) -> str:
    figures = []
    for step, frame in zip(steps, frames, strict=True):
        small = Image.fromarray(frame)
        small.thumbnail((SIDE, SIDE))
        figures.append(f"<figure>{page.picture(np.asarray(small), 'JPEG')}<figcaption>step {step}</figcaption></figure>")
    return f'<h3>Camera {html.escape(camera)}</h3><div class="strip">{" ".join(figures)}</div>'


def _window(window: Window, robot: Robot, statistics: Statistics | None) -> str:
    past = "" if window.mask.all() else " Grey steps lie past the episode's end: nothing is learned of them."
    parts = [f"<h3>Window at step {window.step}</h3><p>Its chunk, in the robot's units.{past}</p>"]
    parts.append(_chunk(robot, window.actions, window.mask))
    if statistics is not None:
        state, actions, mask = learned(window, robot, statistics)
        relative = ", joints relative to the state" if robot.relative else ""
        numbers = ", ".join(f"{one.name} {value:.3f}" for one, value in zip(robot.state, state, strict=True))
        parts.append(f"<p>As a policy learns it: normalised{relative}. The state that it reads: {html.escape(numbers)}.</p>")
        parts.append(_chunk(robot, actions, mask))
    return "".join(parts)


def learned(window: Window, robot: Robot, statistics: Statistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a policy that is no wider than this robot would be trained on: state [dims], actions [horizon, dims], mask [horizon]."""
    widths = EmbodimentConfig(state_width=len(robot.state), action_width=len(robot.action))
    config = PolicyConfig(robots=(robot.name,), horizon=robot.horizon, embodiment=widths)
    names: Mapping[str, Robot] = {robot.name: robot}
    rows, chunks = training_rows([window], names, {robot.name: statistics}, config)
    return rows.state[0], chunks.actions[0], chunks.mask[0].all(axis=-1)


def _chunk(robot: Robot, actions: np.ndarray, mask: np.ndarray) -> str:
    """actions [horizon, dims], mask [horizon]."""
    rows = [
        [(f"+{i}", ""), *((f"{value:.4f}", "" if counts else "past") for value in step)]
        for i, (step, counts) in enumerate(zip(actions, mask.tolist(), strict=True))
    ]
    return _table(("step", *(dimension.name for dimension in robot.action)), rows)
