"""What `blm eval openloop` found, to be read: tables for a terminal and in Markdown, and a page with the chunks over what was done."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm_jax.data import page
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.sets import Episode
from blm_jax.data.page import printable
from blm_jax.data.plot import Plot

EPISODES = 4  # that the page shows
FANS, DRAWN = 200, 8  # moments of an episode whose chunks are drawn, and samples of each
STEPS = 8  # of the horizon, that a table has
SAID = 5  # bad episodes that a message names
NONE = "-"
WIDE, NARROW = 640, 260  # pixels of plots
COLOURS = ("#d98a3d", "#b0552b", "#7a9e3f", "#5b8bb2", "#8a8a8a", "#bbbbbb")  # of ways of acting, in their order
STYLE = """
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 } .scroll { overflow-x: auto }
td, th { padding: 1px 8px; text-align: right; border-bottom: 1px solid #eee } td:first-child, th:first-child { text-align: left }
i { display: inline-block; width: 1.5em; height: .6em }
.done { stroke: #222; stroke-width: 1.6 } .made { stroke: #d98a3d; stroke-width: 1; opacity: .6 }
"""

Row = tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """An episode, and the chunks of the steps that were looked at."""

    path: str
    number: int
    episode: Episode
    steps: Sequence[int]
    chunks: np.ndarray  # [steps, samples, horizon, dims]


# --- tables ------------------------------------------------------------------------------------------------------------------


def as_text(result: Mapping[str, Any]) -> str:
    return "\n\n".join("\n".join(part) for part in _parts(result, _aligned))


def as_markdown(result: Mapping[str, Any]) -> str:
    lines = "\n\n".join("\n".join(part) for part in _parts(result, _marked))
    return f"# blm eval openloop\n\n{lines}\n"


def _parts(result: Mapping[str, Any], table: Callable[[Sequence[Row]], list[str]]) -> Iterator[list[str]]:
    for robot, found in result["robots"].items():
        yield headlines(result, robot, found)
        yield ["Mean absolute error in the robot's units, and as a share of the range that normalisation brings to -1 to 1:"]
        yield table(dimension_rows(found))
        yield ["Over the horizon, as a share of the ranges:"]
        yield table(horizon_rows(found))


def headlines(result: Mapping[str, Any], robot: str, found: Mapping[str, Any]) -> list[str]:
    looks = f"{_count(found['moments'], 'moment')} of {_count(found['episodes'], 'episode')}, every {_count(result['every'], 'step')}"
    lines = [
        f"{result['model']} drives {robot}: {looks}",
        f"chunks of {_count(found['horizon'], 'step')}, {_count(result['samples'], 'sample')} each, "
        f"{_count(result['denoising_steps'], 'denoising step')}, seed {result['seed']}",
    ]
    bad = [(one["path"], wrong) for one in found["sets"] for wrong in one["bad"]]
    lines += [f"bad, and left out: {path}, episode {wrong['episode']}: {printable(wrong['reason'])}" for path, wrong in bad[:SAID]]
    return [*lines, f"and {len(bad) - SAID} more bad episodes"] if len(bad) > SAID else lines


def dimension_rows(found: Mapping[str, Any]) -> list[Row]:
    """The head, a row a dimension, and one of all."""
    errors = found["errors"]
    rows: list[Row] = [("dimension", "unit", "range", *errors, "rmse of policy")]
    for dimension in found["dimensions"]:
        name = dimension["name"]
        own = [each["dimensions"][name] for each in errors.values()]
        cells = [f"{_number(one['mae'])} {_percent(one['mae_of_range']):>6}" for one in own]
        rows.append((name, dimension["unit"], _number(dimension["range"]), *cells, _number(own[0]["rmse"])))
    rows.append(("all", "", "", *(_percent(one["of_range"]) for one in errors.values()), ""))
    return rows


def horizon_rows(found: Mapping[str, Any]) -> list[Row]:
    """The head, and a row for some steps of the chunk, the first and the last among them."""
    errors = found["errors"]
    rows: list[Row] = [("step", *errors)]
    for step in page.spread(found["horizon"], STEPS):
        rows.append((f"+{step}", *(_percent(one["horizon"]["of_range"][step]) for one in errors.values())))
    return rows


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g} %"


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _marked(rows: Sequence[Row]) -> list[str]:
    head, *rest = [f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in rows]
    return [head, f"|{'---|' * len(rows[0])}", *rest]


# --- the page ----------------------------------------------------------------------------------------------------------------


def as_html(result: Mapping[str, Any], robot: Robot, shown: Sequence[Shown]) -> bytes:
    found = result["robots"][robot.name]
    lines = headlines(result, robot.name, found)
    body = [
        f"<p>{'<br>'.join(map(html.escape, lines))}</p>",
        "<p>Mean absolute error in the robot's units, and as a share of the range ",
    ]
    body += ["that normalisation brings to -1 to 1.</p>", _table(dimension_rows(found)), "<h2>Over the horizon</h2>", _key(found)]
    body += [_horizon(found, None), *(_horizon(found, i) for i in range(len(robot.action)))]
    body += [_section(one, robot) for one in shown]
    return page.as_page(f"Open loop: {robot.name}", body, STYLE, "blm eval openloop")


def _table(rows: Sequence[Row]) -> str:
    head, *rest = [[html.escape(cell) for cell in row] for row in rows]
    lines = [f"<tr><th>{'</th><th>'.join(head)}</th></tr>", *(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rest)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _key(found: Mapping[str, Any]) -> str:
    ways = zip(found["errors"], COLOURS, strict=False)
    marks = [f'<i style="background: {colour}"></i> {html.escape(name)}' for name, colour in ways]
    return f"<p>{', '.join(marks)}</p>"


def _horizon(found: Mapping[str, Any], dimension: int | None) -> str:
    """Error by step of the chunk: of one dimension in its unit, or of all as a share of their ranges."""
    if dimension is None:
        caption, curves = "all, % of the ranges", [_floats(one["horizon"]["of_range"]) * 100 for one in found["errors"].values()]
    else:
        about = found["dimensions"][dimension]
        caption = f"{about['name']}, {about['unit']}"
        curves = [_floats([step[dimension] for step in one["horizon"]["mae"]]) for one in found["errors"].values()]
    known = np.concatenate(curves)
    high = float(np.nanmax(known, initial=0.0)) or 1.0
    plot = Plot(NARROW, 0.0, high, max(1, found["horizon"] - 1))
    for values, colour in zip(curves, COLOURS, strict=False):
        plot.curve(range(len(values)), values, f'style="stroke: {colour}"')
    return plot.figure(caption, f"+{found['horizon'] - 1}")


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _section(one: Shown, robot: Robot) -> str:
    count, samples = len(one.episode.action), one.chunks.shape[1]
    drawn = page.spread(len(one.steps), FANS)
    left_out = [f"{len(drawn)} of {len(one.steps)} moments"] * (len(drawn) < len(one.steps))
    left_out += [f"{DRAWN} of {samples} samples"] * (samples > DRAWN)
    said = f" {html.escape(printable(one.episode.instructions[0]))}, {count} steps."
    more = f" Drawn are {' and '.join(left_out)}." if left_out else ""
    parts = [f'<h2 id="episode-{one.number}">Episode {one.number} of {html.escape(one.path)}</h2><p>{said}{more}</p>']
    parts.append('<p><i style="background: #222"></i> what was done, <i style="background: #d98a3d"></i> what the policy would do</p>')
    parts += [_fans(one, drawn, i, f"{dimension.name}, {dimension.unit}") for i, dimension in enumerate(robot.action)]
    return f"<section>{''.join(parts)}</section>"


def _fans(one: Shown, drawn: Sequence[int], dimension: int, caption: str) -> str:
    """The chunks of an episode over the trajectory, in one dimension."""
    done = one.episode.action[:, dimension]
    made = one.chunks[drawn, :DRAWN, :, dimension]  # [moments, samples, horizon]
    plot = Plot(WIDE, float(min(done.min(), made.min())), float(max(done.max(), made.max())), max(1, len(done) - 1))
    for step, samples in zip([one.steps[i] for i in drawn], made, strict=True):
        left = len(done) - step  # what lies past the end was never judged
        for values in samples:
            plot.curve(range(step, step + len(values[:left])), values[:left], 'class="made"')
    plot.curve(range(len(done)), done, 'class="done"')
    return plot.figure(caption, str(len(done) - 1))
