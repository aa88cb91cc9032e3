"""Ten thousand records, most of them broken in one of many ways: each is kept or reported with its line and a clear reason."""

from __future__ import annotations

import base64
import copy
import functools
import json
import os
import random
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blm_jax.data import command
from blm_jax.data.corpora.corpus import open_corpus
from blm_jax.data.prompt import PromptEngine
from tests.data.corpora.material import asked, encoded, mp4, open_engine, pixels, png

COUNT = 10_000
FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**40, "", " ", "\0", "\ud83e", "x" * 300, "<image>", "<video>", "\ufdd1",
    "<|im_end|>", "..", "/", "0.png", "clip.mp4", "data:", [], {}, [[]], [None], [{}], {"url": None}, {"a": {"b": []}}, "file:///etc/passwd",
    "https://example.org/x.png", "human", "gpt", "user", "assistant", "system", "image", "video", "text", "\u202e", "{{ 7 * 7 }}",
)  # fmt: skip
OUTSIDE = ("../secret.png", "deep/../../secret.png", "/etc/passwd", "out.png", "up/secret.png", "/proc/self/mem", "file:///dev/zero")
NOWHERE = ("none.png", "0.png/x", "x" * 999, "a\0b", "~", "https://a.b/c.png", "gs://a/b", "pipe.png", "part.zip", "tfds:x")


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def with_parts(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}]}


def picture(source: Any, **settings: Any) -> dict[str, Any]:
    return with_parts({"type": "image", "image": source, **settings}, {"type": "text", "text": "?"})


def video(source: Any, **settings: Any) -> dict[str, Any]:
    return with_parts({"type": "video", "video": source, "min_pixels": 784, **settings}, {"type": "text", "text": "?"})


def header(width: int, height: int) -> bytes:
    """A PNG of some bytes that promises so many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@functools.cache
def clip(frames: int, form: str = "mp4") -> bytes:
    return mp4(frames, form=form)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(1, len(data) * 4 // 5)]


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def small(chance: random.Random) -> bytes:
    return encoded(pixels(chance.randrange(8, 40), chance.randrange(8, 40), chance.randrange(99)), chance.choice(FORMS))


Make = Callable[[random.Random], Any]
GOOD: tuple[Make, ...] = (
    lambda chance: asked(f"What is {chance.random()}?", "A number."),
    lambda chance: asked("<image>\nWhat?", image=f"{chance.randrange(3)}.png"),
    lambda chance: asked("<image><image>?", images=["0.png", url(small(chance))]),
    lambda chance: asked("What?", image="deep/a b.png", id=chance.random()),
    lambda chance: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * chance.randrange(1, 4)},
    lambda chance: picture(url(small(chance)), max_pixels=chance.randrange(1, 9000)),
    lambda chance: picture("deep/../1.png"),
    lambda chance: asked("<image>?", image="part.zip/0.png"),
    lambda chance: asked("half of nothing: \u202e <|im_end|> \ufdd0 \0", "{{ 1 }} <image>"),
)
RARE: tuple[Make, ...] = (  # good as well, but decoding takes its time
    lambda chance: video("clip.mp4", frames=2),
    lambda chance: video(url(clip(chance.randrange(1, 5)), "video/mp4")),
    lambda chance: video(["0.png", "0.png", "0.png"]),
)
BAD: tuple[Make, ...] = (
    # fields
    lambda chance: chance.choice([x for x in JUNK if not isinstance(x, dict)]),
    lambda chance: {},
    lambda chance: {"image": "0.png", "id": chance.random()},
    lambda chance: {"conversations": chance.choice(JUNK)},
    lambda chance: {"messages": [chance.choice(JUNK)]},
    lambda chance: {"conversations": [{"from": "human", "value": chance.choice([None, 0, [], {}])}, {"from": "gpt", "value": "x"}]},
    lambda chance: {"conversations": [{"from": chance.choice(["", "robot", "tool", 7]), "value": "x"}, {"from": "gpt", "value": "x"}]},
    lambda chance: {"conversations": [{"from": "human", "value": "x"}]},
    lambda chance: asked("What?", chance.choice(["", " ", "\n"])),
    lambda chance: asked("<image>" * chance.randrange(2, 5), image="0.png"),
    lambda chance: asked("<video>"),
    lambda chance: asked("<image>", image="0.png", images=["1.png"]),
    lambda chance: with_parts({"type": "audio", "audio": "x"}),
    lambda chance: with_parts({"type": "image"}),
    lambda chance: picture("0.png", max_pixel=7),
    lambda chance: picture("0.png", max_pixels=chance.choice([0, -3, "9", True, [], float("nan"), float("inf")])),
    lambda chance: picture("0.png", min_pixels=chance.choice([1e9, 1e308, 10**40])),
    lambda chance: picture(chance.choice([0, 1.5, True, [], {}, ["0.png"], {"url": None}, {"path": "0.png"}])),
    lambda chance: video(chance.choice([0, [], [[]], [None], ["0.png", "1.png"], {"url": 7}])),
    lambda chance: video("clip.mp4", fps=chance.choice([0, 1e-300, -1, "2", float("nan")])),
    lambda chance: video("clip.mp4", frames=chance.choice([1e308, 99, -1])),
    lambda chance: video("clip.mp4", min_pixels=1e308),
    lambda chance: video("clip.mp4", min_frames=9, max_frames=3),
    # paths
    lambda chance: asked("<image>", image=chance.choice(OUTSIDE)),
    lambda chance: asked("<video>", video=chance.choice([*OUTSIDE, "..", "up", "../..", "no frames"])),
    lambda chance: asked("<image>", image=chance.choice(NOWHERE)),
    lambda chance: asked("<video>", video=chance.choice(NOWHERE)),
    lambda chance: asked("<image>", image="part.zip/" + chance.choice(["none.png", "../../0.png", "bad.png", "/"])),
    # pictures and videos
    lambda chance: picture(url(cut(png(30, 30, chance.randrange(9)), chance))),
    lambda chance: picture(url(chance.randbytes(chance.randrange(1, 200)))),
    lambda chance: picture(url(header(*chance.choice([(10**5, 10**5), (2**31 - 1, 1), (1, 5000), (0, 5), (9000, 9000)])))),
    lambda chance: picture(url(png(1, 250))),
    lambda chance: picture(chance.choice(["data:", "data:image/png,", "data:image/png;base64,%%%", "data:image/png;base64"])),
    lambda chance: picture(chance.choice(["empty.png", "text.png", "broken.png", "clip.mp4"])),
    lambda chance: video(url(cut(clip(4), chance))),
    lambda chance: video(url(chance.randbytes(chance.randrange(1, 200)))),
    lambda chance: video(url(clip(0))),  # no frame is in it
    lambda chance: video(url(chance.choice([b"\0\0\0\x18ftypmp42" + b"\0" * 40, b"#EXTM3U\n/etc/passwd", b"ffconcat version 1.0"]))),
    lambda chance: video(chance.choice(["0.png", "no frames", "text.png", "short.mp4"])),
    # texts
    lambda chance: asked("half \ud83e a letter"),
    lambda chance: asked("What?", "\udc00"),
    lambda chance: asked("word " * 900),
    lambda chance: asked("<image>", image=nested(chance.randrange(1, 300))),
    lambda chance: {"conversations": nested(300)},
    # lines that are no JSON
    lambda chance: b"[" * 50_000,
    lambda chance: b'{"conversations": ' + b"9" * 5000 + b"}",
    lambda chance: json.dumps(asked("What?")).encode()[: chance.randrange(1, 60)],
    lambda chance: json.dumps(asked("What?")).encode().replace(b"What", b"\xff\xfe"),
    lambda chance: chance.randbytes(30).replace(b"\n", b"") + b"\x01",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def mutated(record: Any, chance: random.Random) -> Any:
    """Something in a good record is something else, is gone, is there twice, or has another name. It may still be good."""
    record = copy.deepcopy(record)
    path = chance.choice(places(record)[1:])
    holder = functools.reduce(lambda value, key: value[key], path[:-1], record)
    match chance.randrange(4):
        case 0:
            del holder[path[-1]]
        case 1 if isinstance(holder, list):
            holder.append(holder[path[-1]])
        case 2 if isinstance(holder, dict):
            holder[chance.choice(["from", "value", "role", "content", "type", "image", "text", "url", "x"])] = holder.pop(path[-1])
        case _:
            holder[path[-1]] = chance.choice(JUNK)
    return record


def garbled(record: Any, chance: random.Random) -> bytes:
    """Some bytes of a good record's line are others."""
    return flipped(json.dumps(record).encode(), chance).replace(b"\n", b" ").replace(b"\r", b" ") or b" "


def make(number: int) -> tuple[Any, bool | None]:
    """A record, and whether it is good, if that is known."""
    chance = random.Random(number)
    kind = chance.random()
    if kind < 0.15:
        return chance.choice(GOOD)(chance), True
    if kind < 0.17:
        return chance.choice(RARE)(chance), True
    if kind < 0.62:
        return BAD[number % len(BAD)](chance), False
    if kind < 0.87:
        return mutated(chance.choice(GOOD)(chance), chance), None
    if kind < 0.95:
        return garbled(chance.choice(GOOD)(chance), chance), None
    if kind < 0.99:
        return picture(url(flipped(small(chance), chance))), None
    return video(url(flipped(clip(3), chance), "video/mp4")), None


def write_folder(directory: Path) -> Path:
    folder = directory / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "no frames").mkdir()
    (directory / "secret.png").write_bytes(png(9, 9))
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(20 + i, 20, i))
    (folder / "deep" / "a b.png").write_bytes(png(9, 30))
    (folder / "clip.mp4").write_bytes(clip(4))
    (folder / "short.mp4").write_bytes(clip(4)[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no picture")
    (folder / "broken.png").write_bytes(png(30, 30)[:500])
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "up").symlink_to("..")
    with zipfile.ZipFile(folder / "part.zip", "w") as archive:
        archive.writestr("0.png", png(9, 30))
        archive.writestr("bad.png", b"no picture")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_ten_thousand_records(model_files: Path, engine: PromptEngine, tmp_path: Path) -> None:
    records = [make(number) for number in range(COUNT)]
    folder = write_folder(tmp_path)
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record, _ in records]
    assert all(line.strip() and b"\n" not in line for line in lines)
    (folder / "records.jsonl").write_bytes(b"\n".join(lines))
    out = tmp_path / "corpus"
    result = command.prepare(
        str(folder / "records.jsonl"),
        functools.partial(open_engine, str(model_files)),
        str(out),
        workers=2,
        records_per_shard=500,
        max_tokens=800,
        max_bad=1.0,
    )
    report = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    corpus = open_corpus(out)
    kept = [corpus.stored(number) for number in range(len(corpus))]
    assert result["read"] == COUNT == result["records"] + result["bad"] and result["bad"] == len(report)
    # Each line is in one of them, once.
    assert sorted([entry["line"] for entry in report] + [record.line for record in kept]) == list(range(1, COUNT + 1))
    assert all(entry["record"] == entry["line"] - 1 and entry["file"] == "records.jsonl" for entry in report)
    known = {number + 1: good for number, (_, good) in enumerate(records) if good is not None}
    wrong = [(entry["line"], entry["reason"]) for entry in report if known.get(entry["line"]) is True]
    wrong += [(record.index + 1, str(records[record.index][0])[:200]) for record in kept if known.get(record.index + 1) is False]
    assert not wrong, wrong[:5]
    # One line that a user understands, and no name of an exception that nobody thought of.
    reasons = Counter(entry["reason"] for entry in report)
    odd = [reason for reason in reasons if re.match(r"[A-Za-z]+(Error|Exception|Warning)\b", reason) or "\n" in reason or len(reason) > 600]
    assert not odd, odd[:5]
    assert len(kept) > 2000 and len(report) > 5000 and len(reasons) > 300
    for record, tokens in list(zip(kept, corpus.tokens, strict=True))[:: len(kept) // 50]:
        assert len(engine.encode(record.messages).tokens) == tokens
    with pytest.raises(IndexError):
        corpus.record(len(kept))
    assert np.asarray(corpus.tokens).max() <= 800
