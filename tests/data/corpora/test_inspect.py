"""What is shown of a corpus is what the model gets; and both commands from the command line to the end."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blm_jax import cli
from blm_jax.data import command
from blm_jax.data.corpora.corpus import open_corpus
from blm_jax.data.corpora.inspect_corpus import look
from blm_jax.data.page import histogram, printable, spread
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.prompt_view import frames_of
from blm_jax.data.vision.pictures import prepare_picture
from blm_jax.data.vision.pixels import PixelConfig, VideoConfig
from blm_jax.data.vision.video import prepare_video
from blm_jax.errors import RequestError
from tests.data.corpora.material import asked, mp4, open_engine, pixels, png, write_lines

HOSTILE = "<script>alert(1)</script> \x1b[31m \u202e & </div>"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    (directory / "a.png").write_bytes(png(70, 100))
    (directory / "clip.mp4").write_bytes(mp4(8))
    turns = [("human", f"<image>\n{HOSTILE}"), ("gpt", "A cat. 🦜"), ("human", "Sure?"), ("gpt", "Yes.")]
    two = {"image": "a.png", "conversations": [{"from": who, "value": value} for who, value in turns]}
    records = [two, asked("<video>?", video="clip.mp4"), asked("Only words"), {"id": 3}]
    return write_lines(directory / "records.jsonl", records)


@pytest.fixture(scope="module")
def own_engine(model_files: Path) -> PromptEngine:
    return open_engine(str(model_files))


@pytest.fixture(scope="module")
def corpus(source: Path, own_engine: PromptEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("inspect") / "corpus")
    command.prepare(str(source), lambda: own_engine, out, workers=0, max_bad=0.5)
    return out


def test_what_is_learned_is_shown(corpus: str, own_engine: PromptEngine) -> None:
    shown = look(open_corpus(corpus), 0, own_engine)
    # By hand: 70 / 28 is 2.5, rounded to even, and 100 / 28 is nearest to 4.
    assert shown.text() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>[picture 1: image of 112x56, 8 tokens]<|vision_end|>\n"
        "<script>alert(1)</script> \\x1b[31m \\u202e & </div><|im_end|>\n<|im_start|>assistant\n"
        "⟦A cat. 🦜<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
    )
    learned = sum(len(own_engine.tokenizer.encode(text)) for text in ("A cat. 🦜<|im_end|>", "Yes.<|im_end|>"))
    assert shown.summary()["learned"] == learned and shown.summary()["where"] == "records.jsonl:1"


def test_the_text(corpus: str, own_engine: PromptEngine) -> None:
    result = command.show_corpus(corpus, own_engine, count=5)
    assert [record["record"] for record in result["shown"]] == [0, 1, 2]
    assert result["text"].startswith(f"{corpus}: 3 records of 4, 1 bad (see {corpus}/report.jsonl)\n\ntokens a record: half have up to ")
    assert "2 of 3 records have pictures" in result["text"]
    assert re.search(r"\[picture 1: video of 4 frames of \d+x\d+, 0.8 s, \d+ tokens\]", result["text"])
    assert not any(ord(letter) < 32 and letter != "\n" for letter in result["text"])
    one = command.show_corpus(corpus, own_engine, records=[2])
    assert [record["where"] for record in one["shown"]] == ["records.jsonl:3"] and one["shown"][0]["pictures"] == []


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marked: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    def handle_data(self, data: str) -> None:
        self.words += data
        if [tag for tag, _ in self.tags if tag.endswith("mark")][-1:] == ["mark"]:
            self.marked[-1] += data


def test_the_page(corpus: str, own_engine: PromptEngine, tmp_path: Path) -> None:
    result = command.show_corpus(corpus, own_engine, out=str(tmp_path / "page"))
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"] and result["page"].endswith("page/index.html")
    page = Page((tmp_path / "page" / "index.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and names.count("svg") == 2 and names.count("section") == 3
    assert page.marked == ["A cat. 🦜<|im_end|>", "Yes.<|im_end|>", "That.<|im_end|>", "That.<|im_end|>"]
    assert "<script>alert(1)</script> \\x1b[31m" in page.words
    # The pictures are those that the model sees, pixel by pixel.
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1 + 4
    shown = Image.open(io.BytesIO(base64.b64decode((images[0]["src"] or "").removeprefix("data:image/png;base64,"))))
    assert (str(shown.width), str(shown.height)) == (images[0]["width"], images[0]["height"]) == ("112", "56")
    np.testing.assert_array_equal(
        np.asarray(shown), np.asarray(Image.fromarray(pixels(70, 100)).resize((112, 56), Image.Resampling.BICUBIC))
    )
    # Written again it is written over; what is not its own, never.
    command.show_corpus(corpus, own_engine, out=str(tmp_path / "page"))
    (tmp_path / "page" / "index.html").write_text("<title>My home page</title>")
    with pytest.raises(RequestError, match="is there and not of this command"):
        command.show_corpus(corpus, own_engine, out=str(tmp_path / "page"))


@given(st.integers(28, 150), st.integers(28, 150), st.integers(0, 9))
def test_pixels_come_back_from_patches(height: int, width: int, seed: int) -> None:
    config = PixelConfig(video=VideoConfig(min_pixels=56 * 56, max_pixels=28 * 28 * 9))
    array = pixels(height, width, seed)
    picture = prepare_picture(array, config)
    size = (picture.grid.columns * 14, picture.grid.rows * 14)
    resized = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(frames_of(picture, config), np.stack([resized] * 2))
    frames = [pixels(height, width, seed + i) for i in range(3)]
    video = prepare_video(frames, config)
    size = (video.grid.columns * 14, video.grid.rows * 14)
    resized = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in (*frames, frames[-1])]
    np.testing.assert_array_equal(frames_of(video, config), np.stack(resized))


@given(st.lists(st.integers(1, 10**6), min_size=1))
def test_histograms_hold_all(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths, np.uint32))
    assert [count for _, _, count in bins] == [sum(low <= length <= high for length in lengths) for low, high, _ in bins]
    assert sum(count for _, _, count in bins) == len(lengths)
    assert bins[0][0] == min(lengths) and bins[-1][1] == max(lengths)


def test_small_things() -> None:
    assert spread(10, 3) == [0, 4, 9] and spread(2, 5) == [0, 1] and spread(1, 1) == [0] and spread(5, 1) == [0]
    assert printable("a\r\n\x07\u200dé猫\u00a0") == "a\\r\n\\x07\\u200dé猫\\xa0"


# --- the command line ----------------------------------------------------------------------------------------------------------


def test_from_the_command_line(source: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, arguments = str(tmp_path / "corpus"), ["--model", model]
    prepare = ["data", "prepare", str(source), *arguments, "--out", out, "--workers", "1"]
    assert cli.main(prepare) == 2
    assert re.fullmatch(r"blm: error: 1 of 4 records are bad, 25 %: .* the first is records.jsonl:4: .*\n", capsys.readouterr().err)
    assert cli.main([*prepare, "--max-bad", "25%", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    tokens = int(open_corpus(out).tokens.sum())
    assert printed["report"] == f"{out}/report.jsonl"
    assert {name: printed[name] for name in ("read", "records", "bad", "tokens")} == {"read": 4, "records": 3, "bad": 1, "tokens": tokens}
    assert cli.main([*prepare, "--max-bad", "0.25"]) == 0
    assert capsys.readouterr().out == f"{out}: 3 records of 4, 1 bad, {tokens} tokens\n"
    assert cli.main(["data", "inspect", out, *arguments, "--records", "0,2", "--out", str(tmp_path / "page")]) == 0
    text = capsys.readouterr().out
    assert "⟦A cat. 🦜<|im_end|>⟧" in text and "record 2 (records.jsonl:3)" in text and "record 1 " not in text
    assert text.endswith(f"{tmp_path}/page/index.html shows the pictures\n")
    assert cli.main(["data", "inspect", out, *arguments, "--count", "1", "--json"]) == 0
    assert [record["record"] for record in json.loads(capsys.readouterr().out)["shown"]] == [0]


def test_a_corpus_needs_a_model(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", corpus]) == 2
    assert capsys.readouterr().err == f"blm: error: {corpus} is shown as a model reads it: say of which with --model\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["prepare", "none.jsonl"], "none.jsonl does not exist"),
        (["prepare", "{source}", "--max-bad", "many"], "'many' is no share: write 1% or 0.01"),
        (["prepare", "{source}", "--max-bad", "101%"], "is no share"),
        (["prepare", "{source}", "--workers", "0"], "--workers"),
        (["prepare", "{source}", "--root", "nowhere"], "nowhere does not exist"),
        (["inspect", "{corpus}", "--records", "1,x"], "are no numbers: write 0,5,17"),
        (["inspect", "{corpus}", "--records", "0,7"], "has the records 0 to 2, and no 7"),
        (["inspect", "{corpus}", "--records", "0", "--count", "2"], "not allowed with argument"),
        (["inspect", "{corpus}", "--robot", "panda"], "is a corpus of conversations: --robot is not for it"),
        (["inspect", "{corpus}", "--robots-file", "x"], "is a corpus of conversations: --robots-file is not for it"),
        (["inspect", "{corpus}", "--episodes", "0"], "is a corpus of conversations: --episodes is not for it"),
        (["inspect", "{corpus}", "--stats", "x.json"], "is a corpus of conversations: --stats is not for it"),
        (["inspect", "nowhere"], "nowhere is no directory: name a corpus, as `blm data prepare` writes them, or a set of demonstrations"),
        (["prepares"], "invalid choice"),
    ],
)
def test_wrong_requests(
    arguments: list[str], says: str, source: Path, corpus: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = [argument.format(source=source, corpus=corpus) for argument in arguments]
    out = ["--out", str(tmp_path / "out")] if arguments[0] == "prepare" else []
    assert cli.main(["data", *given, "--model", model, *out]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("blm: error: ") and printed.err.count("\n") == 1 and says in printed.err
    assert list(tmp_path.iterdir()) == []
