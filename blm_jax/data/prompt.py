"""The prompt engine: from messages to what the model reads.

Only the chat template makes structure. Text of messages that spells one of the template's own tokens, such as <|im_end|> or
<|image_pad|>, is read as plain text (transformers calls this `sanitize_control_tokens`); all other added tokens, boxes and
tool calls for instance, keep their meaning, because answers are made of them.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blm_jax.config import BackboneConfig
from blm_jax.data.chat import Tokenizer
from blm_jax.data.positions import rope_positions
from blm_jax.data.vision.pictures import Picture, prepare_picture
from blm_jax.data.vision.pixels import PixelConfig
from blm_jax.data.vision.video import prepare_video
from blm_jax.errors import RequestError

Part = dict[str, Any]  # {"type": "text", "text": ...}, or {"type": "image" or "video", "source": ..., settings}
Turn = tuple[str, list[Part]]  # role and content

TAGS = re.compile(r"<image>|<video>")
# Keys a part of a message may have besides its type: where the contents come from, and how they are sampled.
SOURCES = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "video_url", "url", "path")}
SETTINGS = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"),
}
# Marks around the text of messages while the template is rendered: code points that Unicode keeps from ever being characters.
TEXT, ANSWER, END = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{TEXT}{ANSWER}{END}]")


@dataclass(frozen=True)
class Example:
    """One conversation, ready to be batched."""

    tokens: np.ndarray  # [n] int32
    positions: np.ndarray  # [3, n] int32
    supervised: np.ndarray  # [n] bool: tokens of answers, the one that closes them included
    pictures: tuple[Picture, ...]  # pictures and videos in the order of their tokens
    next_position: int  # of the first generated token


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered chat: the template's own words, a message's text, or an answer's."""

    text: str
    kind: str  # "" for the template, else TEXT or ANSWER


class PromptEngine:
    def __init__(self, config: BackboneConfig, tokenizer: Tokenizer, pixels: PixelConfig, max_length: int | None = None):
        pixels.check(config.vision)
        self.config = config
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.max_length = min(max_length or config.decoder.max_positions, config.decoder.max_positions)
        ids = config.tokens
        structure = tokenizer.template_tokens | {ids.image, ids.video, ids.vision_start, ids.vision_end, ids.pad}
        names = [tokenizer.added[index].content for index in structure if index in tokenizer.added]
        # The longest first: a name may begin with another.
        self._structure = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
    ) -> Example:
        """Tokens, positions and patches of a conversation.

        A message's content is a text or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image": ...},
        {"type": "video", "video": ..., "fps": ...}. Where `images` or `videos` are given, the tags <image> and <video>
        in texts stand for them, in order; otherwise such tags are text like any other.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise RequestError(f"messages are a list such as [{{'role': 'user', 'content': 'Hello'}}], not {type(messages).__name__}")
        turns = [read_message(message) for message in messages]
        if not turns:
            raise RequestError("there are no messages: give at least one, such as {'role': 'user', 'content': 'Hello'}")
        if images is not None or videos is not None:
            turns = place_tags(turns, images or (), videos or ())
        pictures = tuple(self._prepare(part) for _, parts in turns for part in parts if part["type"] != "text")
        tokens, supervised = self._tokenize(self._render(turns, add_generation_prompt))
        tokens, supervised = self._expand(tokens, supervised, pictures)
        largest, known = int(tokens.max(initial=0)), self.config.decoder.vocab
        if largest >= known:
            raise RequestError(
                f"the tokenizer gives id {largest}, the model has {known} tokens: the tokenizer's files are of another model"
            )
        if len(tokens) > self.max_length:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, more than the {self.max_length} allowed: shorten it, or lower max_pixels or fps"
            )
        positions = rope_positions(tokens, [picture.grid for picture in pictures], self.config)
        return Example(tokens, positions, supervised, pictures, int(positions.max()) + 1)

    def _prepare(self, part: Mapping[str, Any]) -> Picture:
        settings = {name: part[name] for name in SETTINGS[part["type"]] if part.get(name) is not None}
        return (prepare_picture if part["type"] == "image" else prepare_video)(part["source"], self.pixels, **settings)

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> list[Span]:
        """The rendered chat in spans, so that the template's words and the messages' are told apart."""
        marked = self.tokenizer.render(template_messages(turns, mark=True), add_generation_prompt=add_generation_prompt)
        plain = self.tokenizer.render(template_messages(turns, mark=False), add_generation_prompt=add_generation_prompt)
        if not plain:
            raise RequestError("the chat template makes nothing of these messages: is it this model's?")
        if MARKS.sub("", marked) != plain:
            raise RequestError("the chat template changes the text of these messages: strip white space around them")
        return split_marked(marked)

    def _tokenize(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n] and supervision [n] of a rendered chat, in which each picture still has one placeholder.

        Text is tokenized as one run over the spans, as a merge may cross them. Only an answer's run ends where the answer
        does: generation starts behind its header, so training has to see the same tokens there.
        """
        text = "".join(span.text for span in spans)
        lengths = [len(span.text) for span in spans]
        kinds = np.repeat([span.kind for span in spans], lengths)  # of each character
        ends = np.cumsum(lengths).tolist()
        answers = [(end - len(span.text), end) for span, end in zip(spans, ends, strict=True) if span.kind == ANSWER]
        # Names of structural tokens that messages spell, wholly or in part, are runs of their own, read as plain text.
        spelled = {match.span() for match in self._structure.finditer(text) if (kinds[match.start() : match.end()] != "").any()}
        borders = {0, len(text)}.union(*answers)
        for start, stop in spelled:
            borders = {border for border in borders if not start < border < stop} | {start, stop}
        closings = {stop for _, stop in answers}
        ids: list[int] = []
        supervised: list[bool] = []
        for start, stop in itertools.pairwise(sorted(borders)):
            encode = self.tokenizer.encode_plain if (start, stop) in spelled else self.tokenizer.encode
            new = encode(text[start:stop])
            answer = bool(kinds[start] == ANSWER)
            ids += new
            supervised += [answer or (i == 0 and start in closings and self._closes(index)) for i, index in enumerate(new)]
        return np.array(ids, np.int32), np.array(supervised, bool)

    def _closes(self, index: int) -> bool:
        """Whether a token of the template that follows an answer's text ends the answer: a picture may follow as well."""
        return index in self.tokenizer.template_tokens and index != self.config.tokens.vision_start

    def _expand(self, tokens: np.ndarray, supervised: np.ndarray, pictures: Sequence[Picture]) -> tuple[np.ndarray, np.ndarray]:
        """Repeat each placeholder once for every visual token of its picture."""
        ids = self.config.tokens
        places = np.flatnonzero(np.isin(tokens, (ids.image, ids.video)))
        wanted = [ids.image if picture.grid.seconds is None else ids.video for picture in pictures]
        if tokens[places].tolist() != wanted:
            raise RequestError(
                f"the chat template writes {len(places)} placeholders for {len(wanted)} pictures and videos: is it this model's?"
            )
        counts = np.ones(len(tokens), int)
        counts[places] = [picture.grid.visual_tokens(self.config.vision.merge) for picture in pictures]
        return np.repeat(tokens, counts), np.repeat(supervised, counts)


def user_turn(text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> dict[str, Any]:
    """A user's message: pictures and videos stand where the text has <image> and <video>, or before it if it has no tag.

    Where none are given, such a tag is text like any other.
    """
    parts: list[Part] = [{"type": "text", "text": text}]
    if (images or videos) and TAGS.search(text):
        [(_, parts)] = place_tags([("user", parts)], images, videos)
    else:
        parts = [{"type": "image", "source": image} for image in images] + [{"type": "video", "source": video} for video in videos] + parts
    content = [part if part["type"] == "text" else {"type": part["type"], part["type"]: part["source"]} for part in parts]
    return {"role": "user", "content": content}


def read_message(message: Mapping[str, Any]) -> Turn:
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
    unknown = sorted(set(given) - {"role", "content"})
    if unknown or set(given) != {"role", "content"}:
        raise RequestError(f"a message has a role and a content, not {', '.join(unknown) or sorted(given) or type(message).__name__}")
    role, content = given["role"], given["content"]
    if not isinstance(role, str) or not re.fullmatch(r"\w+", role):
        raise RequestError(f"the role of a message is one word, such as user or assistant, not {role!r}")
    if isinstance(content, str):
        return role, [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"the content of a message is a text or a list of parts, not {type(content).__name__}")
    return role, [read_part(part) for part in content]


def read_part(part: Any) -> Part:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    kind = {"image_url": "image", "video_url": "video"}.get(str(kind), kind)
    if not isinstance(kind, str) or kind not in SOURCES:
        raise RequestError(f"a part of a message has the type text, image or video, and a text its text; got {short(part)}")
    known = ("type", "detail", *SOURCES[kind], *SETTINGS[kind])
    for key in part:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise RequestError(f"unknown key {key!r} in a part of type {kind}" + (f": did you mean {near[0]!r}?" if near else ""))
    sources = {key: part[key] for key in SOURCES[kind] if part.get(key) is not None}
    if len(sources) != 1:
        raise RequestError(f"a part of type {kind} has one of {', '.join(SOURCES[kind])}; got {sorted(sources) or 'none'}")
    [(key, source)] = sources.items()
    if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
        source = source.get("url")
    if key == "base64":
        source = f"data:image;base64,{source}"
    return {"type": kind, "source": source} | {name: part[name] for name in SETTINGS[kind] if name in part}


def place_tags(turns: Sequence[Turn], images: Sequence[Any], videos: Sequence[Any]) -> list[Turn]:
    """Replace the tags in texts by the pictures and videos they stand for."""
    given = {"image": images, "video": videos}
    tags = [tag[1:-1] for _, parts in turns for part in parts if part["type"] == "text" for tag in TAGS.findall(part["text"])]
    wrong = [
        f"{tags.count(kind)} <{kind}> tags for {len(sources)} {kind}s"
        for kind, sources in given.items()
        if tags.count(kind) != len(sources)
    ]
    if wrong:
        raise RequestError(f"the messages have {' and '.join(wrong)}: there must be one tag each")
    rest = {kind: iter(sources) for kind, sources in given.items()}
    return [(role, [piece for part in parts for piece in split_tags(part, rest)]) for role, parts in turns]


def split_tags(part: Part, rest: Mapping[str, Iterator[Any]]) -> Iterator[Part]:
    if part["type"] != "text":
        yield part
        return
    text, place = part["text"], 0
    for match in TAGS.finditer(text):
        if match.start() > place:
            yield {"type": "text", "text": text[place : match.start()]}
        kind = match.group()[1:-1]
        yield {"type": kind, "source": next(rest[kind])}
        place = match.end()
    if place < len(text) or not text:
        yield {"type": "text", "text": text[place:]}


def template_messages(turns: Sequence[Turn], mark: bool) -> list[dict[str, Any]]:
    """Messages as a template wants them. It learns that there is a picture, and nothing of what is in it."""
    messages = []
    for role, parts in turns:
        start = ANSWER if role == "assistant" else TEXT
        content: list[dict[str, str]] = []
        for part in parts:
            if part["type"] != "text":
                content.append({"type": part["type"]})
                continue
            text = MARKS.sub("\ufffd", part["text"])
            content.append({"type": "text", "text": f"{start}{text}{END}" if mark else text})
        only_text = len(content) == 1 and content[0]["type"] == "text"
        messages.append({"role": role, "content": content[0]["text"] if only_text else content})
    return messages


def split_marked(text: str) -> list[Span]:
    """The spans of a rendered chat; texts that touch are one. Empty texts have spans too: an empty answer is closed like any other."""
    spans: list[Span] = []
    kind, place = "", 0
    for match in [*MARKS.finditer(text), None]:
        stop = match.start() if match else len(text)
        if kind and spans and spans[-1].kind == kind:
            spans[-1] = Span(spans[-1].text + text[place:stop], kind)
        elif kind or stop > place:
            spans.append(Span(text[place:stop], kind))
        if match:
            kind = "" if match.group() == END else match.group()
            place = match.end()
    return spans


def short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
