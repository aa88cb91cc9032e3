"""What `blm eval world` found, to be read: a table of robots and tasks, for a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 1.959963984540054  # of 95 %, two-sided


def summary(done: Sequence[Mapping[str, Any]], robots: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    found = {
        (robot, task): _of([one for one in done if (one["robot"], one["task"]) == (robot, task)]) for robot in robots for task in tasks
    }
    return {
        "cells": [{"robot": robot, "task": task, **cell} for (robot, task), cell in found.items()],
        "by_task": {task: _of([one for one in done if one["task"] == task]) for task in tasks},
        "by_robot": {robot: _of([one for one in done if one["robot"] == robot]) for robot in robots},
        "all": _of(list(done)),
    }


def _of(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = len(episodes)
    wins = sum(one["success"] for one in episodes)
    low, high = interval(wins, count)
    steps = [one["steps"] for one in episodes if one["success"]]
    return {
        "episodes": count,
        "success": wins / max(count, 1),
        "low": low,
        "high": high,
        "once": sum(one["once"] for one in episodes) / max(count, 1),
        "right": sum(one["right"] for one in episodes) / max(count, 1),
        "mean_steps": sum(steps) / len(steps) if steps else None,  # to the first success, of those that held it
    }


def interval(wins: int, count: int) -> tuple[float, float]:
    """Wilson's, of 95 %."""
    if not count:
        return 0.0, 1.0
    share, square = wins / count, CONFIDENCE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    reach = CONFIDENCE * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The head, a row a robot, and one of all."""
    tasks, robots = list(result["by_task"]), list(result["by_robot"])
    cells = {(cell["robot"], cell["task"]): cell for cell in result["cells"]}
    table = [["", *tasks, "all"]]
    table += [[robot, *(_percent(cells[robot, task]) for task in tasks), _percent(result["by_robot"][robot])] for robot in robots]
    return [*table, ["all", *(_percent(result["by_task"][task]) for task in tasks), _percent(result["all"])]]


def _percent(cell: Mapping[str, Any]) -> str:
    return f"{100 * cell['success']:.0f}"


def headline(result: Mapping[str, Any]) -> str:
    each = result["cells"][0]["episodes"] if result["cells"] else 0
    told = ", ".join(name for name in ("two", "blind", "shuffled") if result.get(name))
    every = result["all"]
    right = f", the right one moved in {100 * every['right']:.1f} %" if result.get("two") else ""
    who = f"{result['model']}{f' ({told})' if told else ''}"
    sure = f"95 %: {100 * every['low']:.1f} to {100 * every['high']:.1f}"
    return (
        f"{who}: {100 * every['success']:.1f} % of {every['episodes']} episodes, {each} a cell ({sure}){right}; "
        "per cent of those in which the task's rule held for the last half second"
    )


def as_text(result: Mapping[str, Any]) -> str:
    table = rows(result)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in table]
    return "\n".join([headline(result), "", *lines])


def as_markdown(result: Mapping[str, Any]) -> str:
    head, *others = rows(result)
    lines = [_marked(head), _marked(["---", *["---:"] * (len(head) - 1)]), *map(_marked, others)]
    return "\n".join(["# blm eval world", "", headline(result), "", *lines, ""])


def _marked(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
