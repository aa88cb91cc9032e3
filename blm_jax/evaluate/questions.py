"""`blm eval questions`: what a MODEL answers to questions that have one right answer each, beside what guessing and not seeing are worth.

A source is what `blm data prepare` reads; of each record the last answer is asked for. Beside the keys that training reads, a record may
have lists with an entry for each of its answers: `types`, by which answers are told apart; `leeway`, for answers that are numbers: how far
from them still is right.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from blm_jax import mesh as meshes
from blm_jax.config import HardwareConfig, MeshConfig, SamplingConfig
from blm_jax.convert.team import Team
from blm_jax.data.corpora.conversations import read_record
from blm_jax.data.corpora.media import Media
from blm_jax.data.corpora.prepare import messages_of
from blm_jax.data.corpora.sources import open_source
from blm_jax.data.files import one_line, open_path, write_whole
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.errors import RequestError
from blm_jax.evaluate.answers import NUMBER, distance, is_right, plain
from blm_jax.infer.session import Model, load
from blm_jax.weights.engine import open_engine

BATCH = 64  # questions of a device at a time
READ = 1024  # records of a source
LONGEST = 32  # tokens of an answer


@dataclass(frozen=True)
class Request:
    model: str
    source: str
    limit: int | None = None  # of the source's first questions
    out: str | None = None
    backbone: str | None = None
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass(frozen=True)
class Asked:
    type: str
    prompt: Example
    text: str  # of the question, to be read by people
    answer: str
    leeway: float | None

    def is_right(self, said: str) -> bool:
        return is_right(said, self.answer, self.leeway)


def questions(request: Request) -> dict[str, Any]:
    """What `blm eval questions --json` prints, and `text` for a terminal."""
    start = time.perf_counter()
    engine = open_engine(request.model)
    asked = list(_read(request, engine))
    if not asked:
        raise RequestError(f"{request.source} has no questions")
    wanted = meshes.serving(engine.config) if request.hardware.mesh == MeshConfig() else request.hardware.mesh
    mesh = meshes.make_mesh(wanted)
    model = load(request.model, mesh, request.hardware.compute, engine, request.backbone)
    loaded = time.perf_counter()
    said = _said(model, asked, BATCH * meshes.batch_shards(mesh))
    rows_of: dict[str, list[int]] = {}
    for i, one in enumerate(asked):
        rows_of.setdefault(one.type, []).append(i)
    types = {name: _of_type(rows_of[name], asked, said) for name in sorted(rows_of)}
    result = {
        "model": request.model,
        "source": request.source,
        "types": types,
        "all": _of_all(types),
        "seconds": {"load": loaded - start, "run": time.perf_counter() - loaded},
    }
    result["text"] = as_text(result)
    if request.out is not None:
        _write(request.out, result, asked, said)
    return result


def _said(model: Model, asked: Sequence[Asked], rows: int) -> dict[str, list[str]]:
    """The answers to all, with their pictures and with black ones."""
    # Of one length together: prompts are padded to the longest beside them.
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt.tokens))
    said = {"seen": [""] * len(asked), "blind": [""] * len(asked)}
    quiet = None if jax.process_index() == 0 else True
    with tqdm(total=2 * len(asked), unit=" answers", desc="questions", disable=quiet) as bar:
        for name, answers in said.items():
            for first in range(0, len(order), rows):
                places = order[first : first + rows]
                prompts = [asked[i].prompt if name == "seen" else _blind(asked[i].prompt) for i in places]
                given = model.generate_batch(prompts, SamplingConfig(max_new_tokens=LONGEST))
                for i, answer in zip(places, given, strict=True):
                    answers[i] = answer.text.strip()
                bar.update(len(places))
    return said


def _read(request: Request, engine: PromptEngine) -> Iterator[Asked]:
    source = open_source(request.source)
    media, left = Media(source.root), request.limit
    for piece in source.pieces(READ):
        for item in piece.items:
            if left == 0:
                return
            where = f"record {item.index} of {item.file}"
            if item.problem:
                raise RequestError(f"{where}: {item.problem}")
            try:
                yield _asked(source.read(item), media, engine)
            except RequestError as error:
                raise RequestError(f"{where}: {one_line(error)}") from error
            left = None if left is None else left - 1


def _asked(record: Any, media: Media, engine: PromptEngine) -> Asked:
    turns = read_record(record)
    last = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
    answer = " ".join(part["text"] for part in turns[last][1] if part["type"] == "text")
    text = " ".join(part["text"] for part in turns[last - 1][1] if part["type"] == "text").strip() if last else ""
    prompt = engine.encode(messages_of(turns[:last], media), add_generation_prompt=True)
    leeway = _last(record, "leeway")
    if leeway is not None and not NUMBER.search(answer):
        raise RequestError(f"leeway is {leeway}, but the answer {answer!r} has no number")
    return Asked(str(_last(record, "types") or "answers"), prompt, text, answer, None if leeway is None else float(leeway))


def _last(record: Any, key: str) -> Any:
    values = record.get(key) if isinstance(record, Mapping) else None
    return values[-1] if values else None


def _blind(prompt: Example) -> Example:
    """Of the same question, with black pictures."""
    return replace(prompt, pictures=tuple(replace(picture, raw=np.zeros_like(picture.raw)) for picture in prompt.pictures))


# --- what came out -------------------------------------------------------------------------------------------------------


def _of_type(rows: Sequence[int], asked: Sequence[Asked], said: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    right = {name: float(np.mean([asked[i].is_right(answers[i]) for i in rows])) for name, answers in said.items()}
    common = Counter(plain(asked[i].answer) for i in rows).most_common(1)[0]
    found: dict[str, Any] = {
        "questions": len(rows),
        "right": right["seen"],
        "blind": right["blind"],
        "majority": float(np.mean([asked[i].is_right(common[0]) for i in rows])),
        "majority_answer": common[0],
    }
    if all(asked[i].leeway is not None for i in rows):
        offs = [distance(said["seen"][i], asked[i].answer) for i in rows]
        known = [off for off in offs if off is not None]
        found["median_off"] = float(np.median(known)) if known else None
        found["leeway"] = asked[rows[0]].leeway
    return found


def _of_all(types: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    count = sum(one["questions"] for one in types.values())
    whole = {name: sum(one["questions"] * one[name] for one in types.values()) / count for name in ("right", "blind", "majority")}
    return {"questions": count, **whole}


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    table = [["", "questions", "right %", "blind %", "majority %", "off (median)"]]
    for name, one in [*result["types"].items(), ("all", result["all"])]:
        off = "" if one.get("median_off") is None else f"{one['median_off']:.1f} (<= {one['leeway']:g})"
        table.append([name, str(one["questions"]), *(f"{100 * one[key]:.1f}" for key in ("right", "blind", "majority")), off])
    return table


def as_text(result: Mapping[str, Any]) -> str:
    table = _rows(result)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in table)


def as_markdown(result: Mapping[str, Any]) -> str:
    head, *others = _rows(result)
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---", *["---:"] * (len(head) - 1)], *others)]
    return "\n".join(["# blm eval questions", "", f"{result['model']} on {result['source']}", "", *lines, ""])


def _write(out: str, result: dict[str, Any], asked: Sequence[Asked], said: Mapping[str, Sequence[str]]) -> None:
    directory = open_path(out)

    def write() -> None:
        lines = (
            {"type": one.type, "question": one.text, "answer": one.answer, **{name: answers[i] for name, answers in said.items()}}
            for i, one in enumerate(asked)
        )
        write_whole(directory / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        write_whole(directory / "questions.md", as_markdown(result).encode())
        told = {name: value for name, value in result.items() if name != "text"}
        write_whole(directory / "questions.json", json.dumps(told, indent=1).encode() + b"\n")

    Team.of_all_processes().together(write if jax.process_index() == 0 else lambda: None)
