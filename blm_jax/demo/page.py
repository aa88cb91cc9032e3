"""What the demo has done, as one page for a newcomer: a picture first, then what happened and what came out, then how to do it by hand.

`told` is the demo's account of itself. What it does not tell of is left out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from blm_jax.data.page import as_page, data_url, printable
from blm_jax.data.plot import Plot
from blm_jax.demo.style import STYLE
from blm_jax.evaluate.answers import is_right

Told = Mapping[str, Any]

RIGHT, WRONG = 8, 6  # answers that are shown, at most
SUCCESSES, FAILURES = 12, 6  # films that are shown, at most
WIDE, TALL = 420, 180  # pixels of a plot
CURVES = {  # names in a run's log: what each is
    "loss": "loss of the answers' words",
    "action": "loss of the actions",
    "future": "loss of what will be seen when a chunk is done",
}
CONTROLS = {
    "untrained": ("Not trained", "the same policy before it had learned"),
    "blind": ("Not seeing", "the trained policy, shown black pictures"),
    "two": ("Two cubes", "only the instruction says which one is meant"),
    "shuffled": ("The other cube named", "the same scenes and goals, but the instruction names the other cube"),
}
SIDES = {"least": "at least", "most": "at most"}
NONE, HALF, ALL = (244, 209, 182), (247, 244, 236), (176, 213, 226)  # colours of a share


def page(told: Told, out: epath.Path) -> str:
    """Paths in `told` are relative to `out`, where the demo has written everything, or stand for themselves."""
    parts: tuple[Callable[[Told, epath.Path], str], ...] = (
        _lead,
        _sheet,
        _headline,
        _order,
        _stage_one,
        _questions,
        _answers,
        _stage_two,
        _world,
        _films,
        _export,
        _checks,
        _times,
        _commands,
        _machine,
    )
    return as_page("What the demo did", [part(told, out) for part in parts], STYLE, "blm demo").decode()


# --- the beginning -----------------------------------------------------------------------------------------------------------


def _lead(told: Told, out: epath.Path) -> str:
    began = "random weights" if told.get("from_scratch") else "the small base model that comes with the package"
    took = f", in {_duration(told['total_seconds'])}," if "total_seconds" in told else ""
    seed = f", with seed {_text(told['seed'])}" if "seed" in told else ""
    return (
        f'<p class="lead">On this machine{took} one small model has learned to answer questions about what it sees, and to drive robot '
        f"arms. It began from {began}; a simulator made what it learned from; nothing was downloaded. Every number below was measured in "
        f"this run{seed}.</p>"
    )


def _sheet(told: Told, out: epath.Path) -> str:
    path = told.get("world", {}).get("sheet")
    shown = _image(out, path, "frames of an episode of each robot and task") if path else ""
    words = "The trained policy at work: of each robot and task the first episode, from left to right. It had met none of these scenes."
    return f'<figure class="sheet">{shown}<figcaption>{words}</figcaption></figure>' if shown else ""


def _headline(told: Told, out: epath.Path) -> str:
    tiles = []
    if "world" in told:
        every = told["world"]["all"]
        tiles.append((_percent(every["success"]), f"of {every['episodes']} episodes succeeded ({_interval(every)})"))
    if "questions" in told:
        every = told["questions"]["all"]
        words = f"of {every['questions']} held-out questions answered rightly; {_percent(every['blind'])} with black pictures"
        tiles.append((_percent(every["right"]), words))
    difference = told.get("export", {}).get("largest_difference")
    if difference is not None:
        tiles.append((f"{difference:.1e}", "is the largest difference between PyTorch's actions and JAX's"))
    if "total_seconds" in told:
        tiles.append((_duration(told["total_seconds"]), "from the first command to this page"))
    drawn = "".join(f"<div><b>{_text(number)}</b>{_text(words)}</div>" for number, words in tiles)
    return f'<div class="tiles">{drawn}</div>' if tiles else ""


def _order(told: Told, out: epath.Path) -> str:
    steps = []
    if "stage_one" in told or "stage_two" in told:
        words = "Scripted experts moved the arms of a simulated world; what succeeded became demonstrations. Scenes of the same world"
        steps.append(("Data", f"{words} became questions that have one right answer each."))
    if "stage_one" in told:
        steps.append(("Stage I, to see and to talk", f"In {_steps(told['stage_one'])} the model learned to answer such questions."))
    if "questions" in told:
        words = "Then it was asked about scenes, and in wordings, that it had not learned from; and once more with black pictures."
        steps.append(("Questions", words))
    if "stage_two" in told:
        words = "What the model knew was kept as it was. A policy on top, which reads what it has in mind and not its words, learned"
        steps.append(("Stage II, to move", f"{words} from the demonstrations how an arm goes on: {_steps(told['stage_two'])}."))
    if "world" in told:
        found = told["world"]
        words = f"{_count(found['by_robot'], 'robot')}, {_count(found['by_task'], 'task')}, {found['all']['episodes']} new episodes"
        steps.append(("Episodes", f"{words}. The policy looks, decides upon a stretch of movement, makes it, and looks again."))
    if told.get("controls"):
        steps.append(("Controls", "The same was done with what should fail, and where only the instruction tells what to do."))
    if "export" in told:
        steps.append(("Export", "The weights left as files that PyTorch reads, without this package."))
    items = "".join(f"<li><b>{name}.</b> {_text(words)}</li>" for name, words in steps)
    return _section("What happened, in order", f"<ol>{items}</ol>" if items else "")


# --- learning ----------------------------------------------------------------------------------------------------------------


def _stage_one(told: Told, out: epath.Path) -> str:
    words = "The loss says how much the model was surprised by the right words: the lower, the better it knew them."
    return _stage("Stage I: learning to see and to talk", words, told.get("stage_one"), out)


def _stage_two(told: Told, out: epath.Path) -> str:
    words = "The loss says how far the movements that the policy would make are from those that the expert made."
    return _stage("Stage II: learning to move", words, told.get("stage_two"), out)


def _stage(title: str, words: str, stage: Told | None, out: epath.Path) -> str:
    log = None if stage is None else out / stage["run"] / "log.jsonl"
    rows = _log(log) if log is not None and log.exists() else []
    plots = [_curve(rows, name, what) for name, what in CURVES.items() if any(row.get(name) is not None for row in rows)]
    if not plots:
        return ""
    key = '<i class="learned"></i> what was learned from, <i class="held"></i> what was held out'
    return _section(title, f"<p>{words} {key}.</p>", *plots)


def _log(path: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _curve(rows: Sequence[Told], name: str, what: str) -> str:
    learned, held = ([(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in (name, f"held_out/{name}"))
    every = [value for _, value in (*learned, *held)]
    plot = Plot(WIDE, min(0.0, *every), max(every), max(step for step, _ in (*learned, *held)), TALL)
    plot.curve([step for step, _ in learned], np.array([value for _, value in learned]), 'class="learned"')
    plot.dots([step for step, _ in held], np.array([value for _, value in held]), 'class="held"')
    last = f"in the end {learned[-1][1]:.3g}" + (f", of what was held out {held[-1][1]:.3g}" if held else "")
    return plot.figure(f"{what} by step: {last}", str(plot.last))


def _questions(told: Told, out: epath.Path) -> str:
    found = told.get("questions")
    if found is None:
        return ""
    head = ("asked for", "questions", "right", "shown black pictures", "the commonest answer", "distance (half are nearer)")
    lines = []
    for name, one in [*found["types"].items(), ("all", found["all"])]:
        off = "" if one.get("median_off") is None else f"{one['median_off']:.3g}, right up to {one['leeway']:g}"
        cells = [f"<td>{one['questions']}</td>", *(_share(one[key]) for key in ("right", "blind", "majority")), f"<td>{off}</td>"]
        lines.append(f"<th>{_text(name)}</th>{''.join(cells)}")
    words = "None of these scenes and wordings was learned from. Beside what was answered rightly stands what the same model answers "
    words += "rightly when it sees nothing, and what always giving the commonest answer would be worth."
    return _section("Questions that it had never met", f"<p>{words}</p>", _table(head, lines))


def _answers(told: Told, out: epath.Path) -> str:
    answers = told.get("answers") or []
    types = told.get("questions", {}).get("types", {})
    judged: dict[bool, list[Told]] = {True: [], False: []}
    for one in answers:
        judged[is_right(one["seen"], one["answer"], types.get(one["type"], {}).get("leeway"))].append(one)
    cards = "".join(_card(one, right, out) for right, most in ((True, RIGHT), (False, WRONG)) for one in _of_each(judged[right], most))
    return _section("Some of its answers", f'<div class="cards">{cards}</div>' if cards else "")


def _of_each(answers: Sequence[Told], most: int) -> list[Told]:
    """The types take turns."""
    groups: dict[str, list[Told]] = {}
    for one in answers:
        groups.setdefault(one["type"], []).append(one)
    return [one for one in chain.from_iterable(zip_longest(*groups.values())) if one is not None][:most]


def _card(one: Told, right: bool, out: epath.Path) -> str:
    pictures = "".join(_image(out, path, "what was shown") for path in one.get("pictures", ()))
    said = f"<p>It said <b class='said'>{_text(one['seen']) or 'nothing'}</b>, which is {'right' if right else 'wrong'}.</p>"
    wanted = "" if right else f"<p>Right is <b>{_text(one['answer'])}</b>.</p>"
    blind = f"<p class='aside'>Seeing nothing: {_text(one['blind']) or 'no answer'}</p>" if "blind" in one else ""
    head = f"<div class='views'>{pictures}</div><p class='aside'>{_text(one['type'])}</p><p class='asked'>{_text(one['question'])}</p>"
    return f'<article class="{"good" if right else "bad"}">{head}{said}{wanted}{blind}</article>'


# --- moving ------------------------------------------------------------------------------------------------------------------


def _world(told: Told, out: epath.Path) -> str:
    found = told.get("world")
    if found is None:
        return ""
    cells = {(cell["robot"], cell["task"]): cell for cell in found["cells"]}
    lines = []
    for robot, every in found["by_robot"].items():
        lines.append(f"<th>{_text(robot)}</th>{''.join(_cell(cells[robot, task]) for task in found['by_task'])}{_cell(every)}")
    lines.append(f"<th>all</th>{''.join(_cell(one) for one in found['by_task'].values())}{_cell(found['all'])}")
    words = "Of how many episodes the task's rule had held for half a second when the time was over; below it, where the true share lies "
    table = f"<p>{words} with a certainty of 95 %.</p>{_table(('', *found['by_task'], 'all'), lines)}"
    return _section("Episodes that it had never met", f'<div class="beside"><div>{table}</div>{_controls(told)}</div>')


def _cell(one: Told) -> str:
    title = f"{one['episodes']} episodes; once in an episode: {_percent(one['once'])}"
    span = f"<small>{100 * one['low']:.0f} to {100 * one['high']:.0f}</small>"
    return f'<td class="share" style="background: {_colour(one["success"])}" title="{title}">{100 * one["success"]:.0f} %{span}</td>'


def _controls(told: Told) -> str:
    controls = {name: one for name, one in (told.get("controls") or {}).items() if one}
    if not controls:
        return ""
    bars = [_bar("The policy", "of the table", told["world"]["all"])]
    bars += [_bar(*CONTROLS.get(name, (name, "")), one) for name, one in controls.items()]
    words = "Is it luck? Does it look, and listen? (Dark lines: where the true share lies, with a certainty of 95 %.)"
    return f"<div><p>{words}</p>{''.join(bars)}</div>"


def _bar(name: str, words: str, one: Told) -> str:
    low, high = 100 * one["low"], 100 * one["high"]
    bar = f'<i style="width: {100 * one["success"]:.1f}%"></i><b style="left: {low:.1f}%; width: {high - low:.1f}%"></b>'
    said = f"<span>{_text(name)} <small>{_text(words)}</small></span><span>{_percent(one['success'])}</span>"
    return f'<div class="bar" title="{_interval(one)}, {one["episodes"]} episodes">{said}<div>{bar}</div></div>'


def _films(told: Told, out: epath.Path) -> str:
    films = sorted(told.get("world", {}).get("films") or [], key=lambda one: one["episode"])  # the first of each cell first
    parts = []
    for title, success, most in (("It succeeded", True, SUCCESSES), ("It failed", False, FAILURES)):
        found = [one for one in films if one["success"] == success]
        shown = "".join(_film(one, out) for one in found[:most])
        left = f", {most} of {len(found)}" if len(found) > most else ""
        parts.append(f'<h3>{title}{left}</h3><div class="films">{shown}</div>' if shown else "")
    words = "Both cameras, as the policy sees them, in real time. What was filmed are the first episodes of each robot and task."
    return _section("Films", f"<p>{words}</p>", *parts) if any(parts) else ""


def _film(one: Told, out: epath.Path) -> str:
    words = f"{one['robot']}, {one['task']}, episode {one['episode']}"
    shown = _image(out, one["path"], words)
    return f"<figure>{shown}<figcaption>{_text(words)}</figcaption></figure>" if shown else ""


# --- the end -----------------------------------------------------------------------------------------------------------------


def _export(told: Told, out: epath.Path) -> str:
    found = told.get("export")
    if not found:
        return ""
    robots = f" of {', '.join(map(_text, found['robots']))}" if found.get("robots") else ""
    words = f"The weights lie in <code>{_text(found['path'])}</code>, with the one file of code that runs them in PyTorch."
    if found.get("largest_difference") is None:
        more = "What PyTorch makes of them was not compared in this run."
    else:
        more = f"For the same observations{robots}, PyTorch's actions and JAX's differ by {found['largest_difference']:.1e} at most."
    return _section("On to PyTorch", f"<p>{words} {more}</p>")


def _checks(told: Told, out: epath.Path) -> str:
    lines = [
        f"<th>{_text(one['what'])}</th><td>{'not measured' if one['value'] is None else format(one['value'], '.3g')}</td>"
        f"<td>{_text(SIDES[one['side']])} {one['bound']:.3g}</td>"
        f'<td class="{"good" if one["holds"] else "bad"}">{"holds" if one["holds"] else "does not hold"}</td>'
        for one in told.get("checks") or ()
    ]
    return _section("What was checked", _table(("", "measured", "bound", ""), lines) if lines else "")


def _times(told: Told, out: epath.Path) -> str:
    seconds = told.get("seconds") or {}
    most = max(seconds.values(), default=0) or 1
    bars = [
        f'<div class="bar"><span>{_text(name)}</span><span>{spent:.1f} s</span>'
        f'<div><i style="width: {100 * spent / most:.1f}%"></i></div></div>'
        for name, spent in seconds.items()
    ]
    total = f"<p>All together {_duration(told['total_seconds'])}.</p>" if "total_seconds" in told else ""
    return _section("Where the time went", total, *bars) if bars else ""


def _commands(told: Told, out: epath.Path) -> str:
    parts = [
        f"<h3>{_text(name)}</h3><pre>{_text(chr(10).join(lines))}</pre>" for name, lines in (told.get("commands") or {}).items() if lines
    ]
    return _section("The same by hand", "<p>Each step is a command that works on real robots' data too.</p>", *parts) if parts else ""


def _machine(told: Told, out: epath.Path) -> str:
    pairs = [(name, value) for part in ("hardware", "versions") for name, value in (told.get(part) or {}).items()]
    lines = [f"<th>{_text(name)}</th><td>{_text(_flat(value))}</td>" for name, value in pairs]
    return _section("Hardware and versions", _table((), lines) if lines else "")


# --- pieces ------------------------------------------------------------------------------------------------------------------


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def _table(head: Iterable[str], lines: Sequence[str]) -> str:
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f'<div class="scroll"><table>{f"<tr>{names}</tr>" if names else ""}<tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _image(out: epath.Path, path: str, words: str) -> str:
    """Empty if it is not there any more: the rest of the page is worth reading all the same."""
    found = next((one for one in (out / path, epath.Path(path)) if one.exists()), None)
    if found is None:
        return ""
    form = Path(path).suffix.removeprefix(".").lower().replace("jpg", "jpeg")
    return f'<img alt="{_text(words)}" src="{data_url(found.read_bytes(), form)}">'


def _share(share: float) -> str:
    return f'<td class="share" style="background: {_colour(share)}">{_percent(share)}</td>'


def _colour(share: float) -> str:
    low, high, part = (NONE, HALF, 2 * share) if share < 0.5 else (HALF, ALL, 2 * share - 1)
    return f"rgb({', '.join(str(round(a + part * (b - a))) for a, b in zip(low, high, strict=True))})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(one: Told) -> str:
    return f"95 %: {100 * one['low']:.1f} to {100 * one['high']:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _steps(stage: Told) -> str:
    return f"{stage['steps']} steps"


def _count(found: Sequence[Any] | Told, what: str) -> str:
    return f"{len(found)} {what}{'s' * (len(found) != 1)}"


def _flat(value: Any) -> str:
    return ", ".join(f"{name} {_flat(one)}" for name, one in value.items()) if isinstance(value, Mapping) else str(value)


def _text(value: Any) -> str:
    return html.escape(printable(str(value)))
