"""Small sources of conversations, and a prompt engine that other processes can open too."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from blm_jax.config import BackboneConfig, DecoderConfig, VisionConfig
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import read_pixel_config

CONFIG = BackboneConfig(VisionConfig(2, 64, 4, 128, 64, (1,)), DecoderConfig(2, 64, 4, 2, 128, 151936, True, (2, 3, 3)))


@functools.lru_cache(maxsize=4)
def open_engine(model: str) -> PromptEngine:
    """A vocabulary takes half a second to read."""
    return PromptEngine(CONFIG, load_tokenizer(model), read_pixel_config(model))


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(array: np.ndarray, form: str = "PNG") -> bytes:
    contents = io.BytesIO()
    Image.fromarray(array).save(contents, form)
    return contents.getvalue()


def png(height: int, width: int, seed: int = 0) -> bytes:
    return encoded(pixels(height, width, seed))


def mp4(frames: int, side: int = 32, rate: int = 10, form: str = "mp4") -> bytes:
    contents = io.BytesIO()
    with av.open(contents, "w", format=form) as container:
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = side
        for i in range(frames):
            array = np.full((side, side, 3), i * 255 // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return contents.getvalue()


def asked(question: str, answer: str = "That.", **media: Any) -> dict[str, Any]:
    """A record as LLaVA writes it."""
    return {**media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """A record a line; what is bytes already, as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((record if isinstance(record, bytes) else json.dumps(record).encode()) + b"\n" for record in records))
    return path


def write_source(directory: Path, records: int) -> Path:
    """Records with and without pictures and videos, of all the forms there are; the path of the JSONL file."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (directory / f"{i}.png").write_bytes(png(40 + 30 * i, 60, i))
    (directory / "clip.mp4").write_bytes(mp4(12))
    forms = [
        lambda i: asked(f"<image>\nWhat is number {i}?", f"It is {i}.", image=f"{i % 3}.png"),
        lambda i: asked("Is <image> like <image>?", "No.", images=["0.png", "2.png"]),
        lambda i: asked(f"Say {i}.", "word " * (i % 40 + 1)),
        lambda i: {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}] * (i % 3 + 1)},
    ]

    def record(i: int) -> Any:
        if i % 13 == 9:  # few, as decoding takes its time
            return asked("<video>\nWhat happens?", f"Nothing, {i} times.", video="clip.mp4")
        return forms[i % 13 % 5 % 4](i)

    return write_lines(directory / "records.jsonl", map(record, range(records)))
