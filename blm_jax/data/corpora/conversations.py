"""Records of conversations, as the field writes them, to the turns that the prompt engine reads.

| keys of a record | who writes it | pictures and videos |
|---|---|---|
| `conversations`: [{`from`: human or gpt, `value`}] | LLaVA, Qwen2.5-VL | `image`, `images`, `video`, `videos`, and tags in texts |
| `conversations`: [{`from`: user or assistant, `value`}] | Qwen-VL | <img>path</img> in the text of a record that names none beside it |
| `messages`: [{`role`, `content`}] | OpenAI, Qwen2.5-VL | parts of type image_url, image, video; or as in the first row |
| a list of messages | Qwen2.5-VL | parts |

A turn is read by its own keys, so `from` and `value` may stand in `messages`, and `role` and `content` in `conversations`. Tags are
<image> and <video>. Where a record names pictures and no text of a prompt has a tag, they stand before the first text of the user.
A tag in an answer is text. `system` beside the turns is their first. Other keys, such as `id`, say nothing to a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from blm_jax.data.files import one_line
from blm_jax.data.prompt import TAGS, Part, Turn, place_tags, read_message, short
from blm_jax.errors import RequestError

TURNS = ("conversations", "messages")
KINDS = {"image": ("image", "images"), "video": ("video", "videos")}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMG = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def read_record(record: Any) -> list[Turn]:
    """The turns of a record. Sources of pictures and videos are what the record says: nothing is opened."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise RequestError(f"a record is an object with conversations or messages, not {short(record)}")
    forms = [key for key in TURNS if record.get(key) is not None]
    if len(forms) != 1:
        raise RequestError(f"a record has either conversations or messages; its keys are {short(sorted(map(str, record)))}")
    given = _list_of_turns(record[forms[0]], forms[0])
    turns = [_read_turn(turn) for turn in given]
    if record.get("system") is not None:
        turns.insert(0, _read_turn({"role": "system", "content": record["system"]}))
    sources = {kind: _sources(record, kind) for kind in KINDS}
    if any(sources.values()):
        turns = _placed(turns, sources)
    elif any(map(_is_spoken, given)):
        # Here a tag is never meant as text: without a picture it is one that got lost.
        turns = _with_img_tags(turns) if _is_qwen_vl(given) else _placed(turns, sources)
    _check_answers(turns)
    return turns


def _list_of_turns(given: Any, key: str) -> Sequence[Any]:
    if isinstance(given, str):  # tables hold what is nested as text
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{key} is a text that is no JSON: {one_line(error)}") from error
    if not isinstance(given, (list, tuple)) or not given:
        raise RequestError(f"{key} is a list of turns, at least one, not {short(given)}")
    return given


def _is_spoken(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("from") is not None


def _is_qwen_vl(turns: Sequence[Any]) -> bool:
    return any(_is_spoken(turn) and turn["from"] == "user" and IMG.search(str(turn.get("value"))) for turn in turns)


def _read_turn(turn: Any) -> Turn:
    if _is_spoken(turn):
        if not isinstance(turn.get("value"), str):
            raise RequestError(f"a turn has from and value, which is a text; got {short(turn)}")
        turn = {"role": turn["from"], "content": turn["value"]}
    elif isinstance(turn, Mapping) and turn.get("role") is None:
        raise RequestError(f"a turn has role and content, or from and value; got {short(turn)}")
    role, parts = read_message(turn)
    if role not in ROLES:
        raise RequestError(f"nobody knows the role {short(role)}: there are {', '.join(ROLES)}")
    return ROLES[role], parts


def _sources(record: Mapping[str, Any], kind: str) -> list[Any]:
    named = {key: record[key] for key in KINDS[kind] if not _is_nothing(record.get(key))}
    if not named:
        return []
    if len(named) > 1:
        raise RequestError(f"a record has {' or '.join(named)}, not both")
    [(key, value)] = named.items()
    if not isinstance(value, (list, tuple)):
        return [value]
    if any(map(_is_nothing, value)):
        raise RequestError(f"{key} lists {short(value)}: one of them is nothing")
    return list(value)


def _is_nothing(value: Any) -> bool:
    """Tables write what is absent as an empty text or list."""
    return value is None or (isinstance(value, (str, bytes, list, tuple)) and len(value) == 0)


def _placed(turns: Sequence[Turn], sources: Mapping[str, list[Any]]) -> list[Turn]:
    """Pictures and videos in the place of their tags; those of a kind that has no tag, before the user's first text."""
    prompts = [i for i, (role, _) in enumerate(turns) if role != "assistant"]
    texts = " ".join(part["text"] for i in prompts for part in turns[i][1] if part["type"] == "text")
    untagged: list[Part] = []
    if not TAGS.search(texts):
        untagged = [{"type": kind, "source": source} for kind, given in sources.items() for source in given]
        sources = {kind: [] for kind in sources}
    placed = dict(zip(prompts, place_tags([turns[i] for i in prompts], sources["image"], sources["video"]), strict=True))
    found = [placed.get(i, turn) for i, turn in enumerate(turns)]
    if untagged:
        first = next((i for i, (role, _) in enumerate(found) if role == "user"), None)
        if first is None:
            raise RequestError("there are pictures or videos, but the user says nothing")
        found[first] = ("user", untagged + found[first][1])
    return found


def _with_img_tags(turns: Sequence[Turn]) -> list[Turn]:
    return [(role, parts if role == "assistant" else [piece for part in parts for piece in _split_img(part)]) for role, parts in turns]


def _split_img(part: Part) -> list[Part]:
    if part["type"] != "text":
        return [part]
    pieces = IMG.split(part["text"])  # text, path, text, path, ..., text
    found: list[Part] = [{"type": "image", "source": piece} if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [piece for piece in found if piece.get("text") != ""] or [part]


def _check_answers(turns: Sequence[Turn]) -> None:
    answers = [parts for role, parts in turns if role == "assistant"]
    if not answers:
        raise RequestError("there is no answer to learn from: no turn is the assistant's")
    for parts in answers:
        if not any(part["type"] != "text" or part["text"].strip() for part in parts):
            raise RequestError("an answer is empty: a model would learn to say nothing")
