"""The prompt engine against Qwen2_5_VLProcessor: ids, supervision, and messages that try to break the structure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blm_jax.config import BackboneConfig
from blm_jax.data.chat import Tokenizer
from blm_jax.data.positions import rope_positions
from blm_jax.data.prompt import Example, PromptEngine, user_turn
from blm_jax.data.vision.pixels import PixelConfig
from blm_jax.errors import RequestError
from tests.data import reference

HEADER = [151644, 77091, 198]  # <|im_start|>assistant\n
IM_END = 151645
ANSWER = {"role": "assistant", "content": "A cat."}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def reference_ids(model_files: Path, messages: Sequence[dict], **options: Any) -> list[int]:
    """What transformers makes of the messages; of a video it is told the grid that ours has."""
    out: Any = reference.processor(model_files).apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    return [int(index) for index in np.asarray(out["input_ids"][0])]


def answers(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The supervised stretches as text. Each must begin right behind a header and end with <|im_end|>."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.supervised, [False]]).astype(int)))
    texts = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        assert example.tokens[start - 3 : start].tolist() == HEADER
        assert example.tokens[stop - 1] == IM_END
        texts.append(tokenizer.decode(example.tokens[start : stop - 1], skip_special=False))
    return texts


# Texts with all that could go wrong: names of tokens whole and in pieces, tags, white space, other scripts.
names = ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]
pieces = [
    *names,
    "<|im_",
    "end|>",
    "<|",
    "|>",
    "assistant",
    "\n",
    "\n\n",
    " ",
    "<image>",
    "e\u0301",
    "\u0301",
    "🦜",
    "{{ 1 }}",
    "{% raw %}",
]
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2\U000f0000\U000f0001")
texts = st.lists(st.sampled_from(pieces) | st.text(letters, max_size=8), max_size=6).map("".join)
tame = texts.map(lambda text: re.sub(r"<\|.*?\|>|<\||\|>|_|end", "", text))
images = st.builds(picture, st.integers(20, 150), st.integers(20, 150))


@st.composite
def contents(draw: st.DrawFn, text: st.SearchStrategy[str] = texts) -> Any:
    """A text, or parts in which no two texts touch."""
    if draw(st.booleans()):
        return draw(text)
    parts: list[dict[str, Any]] = []
    for image in draw(st.lists(images, max_size=3)):
        parts.append({"type": "image", "image": image})
        if draw(st.booleans()):
            parts.append({"type": "text", "text": draw(text)})
    return [*parts, {"type": "text", "text": draw(text)}] if not parts or parts[-1]["type"] == "image" else parts


# A white space with a new line at the beginning of an answer is the one thing that is tokenized apart: see its own test.
replies = texts.map(str.lstrip)
systems = st.lists(st.builds(lambda text: {"role": "system", "content": text}, texts), max_size=1)
turns = st.lists(
    st.tuples(
        st.builds(lambda content: {"role": "user", "content": content}, contents()),
        st.builds(lambda text: {"role": "assistant", "content": text}, replies),
    ),
    min_size=1,
    max_size=3,
).map(lambda pairs: list(itertools.chain(*pairs)))


@settings(max_examples=150)
@given(systems, turns, st.booleans())
def test_ids_equal_the_processors(
    engine: PromptEngine, model_files: Path, tokenizer: Tokenizer, system: list[dict], turns: list[dict], prompt: bool
) -> None:
    """Also where texts spell tokens: then the processor is asked to take them as text, which ours always does."""
    messages = system + turns
    example = engine.encode(messages, add_generation_prompt=prompt)
    assert example.tokens.tolist() == reference_ids(model_files, messages, add_generation_prompt=prompt, sanitize_control_tokens=True)
    normal = engine.tokenizer.backend.normalizer.normalize_str
    assert answers(example, tokenizer) == [normal(turn["content"]) for turn in turns if turn["role"] == "assistant"]
    check_structure(example, messages, engine)


def check_structure(example: Example, messages: Sequence[dict], engine: PromptEngine) -> None:
    ids = engine.config.tokens
    assert (example.tokens == ids.image).sum() == sum(picture.grid.visual_tokens(2) for picture in example.pictures)
    assert (example.tokens == ids.vision_start).sum() == (example.tokens == ids.vision_end).sum() == len(example.pictures)
    explicit = messages[0]["role"] == "system"
    assert (example.tokens == IM_END).sum() == len(messages) + (not explicit)
    assert ids.pad not in example.tokens
    np.testing.assert_array_equal(example.positions, rope_positions(example.tokens, [p.grid for p in example.pictures], engine.config))
    assert example.next_position == example.positions.max() + 1


@settings(max_examples=50)
@given(st.builds(lambda content: {"role": "user", "content": content}, contents(tame)))
def test_ids_equal_the_processors_as_it_comes(engine: PromptEngine, model_files: Path, message: dict) -> None:
    messages = [message]
    expected = reference_ids(model_files, messages, add_generation_prompt=True)
    assert engine.encode(messages, add_generation_prompt=True).tokens.tolist() == expected


def test_boxes_and_tool_calls_keep_their_meaning(engine: PromptEngine, model_files: Path, tokenizer: Tokenizer) -> None:
    text = '<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><tool_call>\n{"name": "go"}\n</tool_call>'
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": text}]
    example = engine.encode(messages)
    assert example.tokens.tolist() == reference_ids(model_files, messages)
    assert {151646, 151647, 151648, 151649, 151657, 151658} <= set(example.tokens.tolist())
    assert answers(example, tokenizer) == [text]


@pytest.mark.parametrize("grid", [(1, 4, 4), (3, 4, 6)])
def test_videos_among_pictures(engine: PromptEngine, model_files: Path, grid: tuple[int, int, int]) -> None:
    frames, rows, columns = grid
    video = [picture(rows * 14, columns * 14, seed) for seed in range(2 * frames)]
    pixels = replace(engine.pixels, video=replace(engine.pixels.video, min_pixels=56 * 56))
    smaller = PromptEngine(engine.config, engine.tokenizer, pixels)
    stand_in = np.zeros((2, 28, 28, 3), np.int64)
    stand_in[0, 0, 0] = grid
    parts = [{"type": "image", "image": picture(60, 90)}, {"type": "video", "video": video}, {"type": "text", "text": "?"}]
    example = smaller.encode([{"role": "user", "content": parts}])
    told = [parts[0], {"type": "video", "video": stand_in}, parts[2]]
    assert example.tokens.tolist() == reference_ids(model_files, [{"role": "user", "content": told}])
    assert [p.grid.seconds for p in example.pictures] == [None, 1.0]
    assert (example.tokens == engine.config.tokens.video).sum() == frames * rows * columns // 4


def test_an_answer_begins_where_generation_does(engine: PromptEngine, tokenizer: Tokenizer, model_files: Path) -> None:
    """A new line at the beginning of an answer would be one token with the header's; the model never sees that when it answers."""
    question = {"role": "user", "content": "Sing."}
    messages = [question, {"role": "assistant", "content": "\n\nLa"}]
    example = engine.encode(messages)
    prompt = engine.encode([question], add_generation_prompt=True)
    np.testing.assert_array_equal(example.tokens[: len(prompt.tokens)], prompt.tokens)
    assert not example.supervised[: len(prompt.tokens)].any() and example.supervised[len(prompt.tokens)]
    assert answers(example, tokenizer) == ["\n\nLa"]
    joined = reference_ids(model_files, messages)
    assert joined != example.tokens.tolist()
    assert tokenizer.decode(joined, skip_special=False) == tokenizer.decode(example.tokens, skip_special=False)


def test_several_answers_and_empty_ones(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    user = {"role": "user", "content": "Hi"}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [user, {"role": "assistant", "content": ""}, user, {"role": "assistant", "content": parts}, user, ANSWER]
    example = engine.encode(messages)
    assert answers(example, tokenizer) == ["", "one two", "A cat."]
    assert not engine.encode([user], add_generation_prompt=True).supervised.any()


def test_a_name_spelled_over_two_parts_is_text(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}, {"type": "text", "text": "<|image_pad|>"}]
    example = engine.encode([{"role": "user", "content": parts}])
    assert (example.tokens == IM_END).sum() == 2  # of the system's turn and of this one
    assert "user\n<|im_end|><|image_pad|><|im_end|>" in tokenizer.decode(example.tokens, skip_special=False)


def test_marks_in_texts_are_replaced(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    example = engine.encode([{"role": "user", "content": "a\ufdd1b\ufdd2c"}, ANSWER])
    assert answers(example, tokenizer) == ["A cat."]
    assert "user\na\ufffdb\ufffdc<|im_end|>" in tokenizer.decode(example.tokens, skip_special=False)


def test_all_forms_of_a_picture(engine: PromptEngine, tmp_path: Path) -> None:
    image = picture(60, 60)
    path = tmp_path / "a.png"
    image.save(path)
    expected = engine.encode([{"role": "user", "content": [{"type": "image", "image": image}]}])
    forms: list[Any] = [{"type": "image", key: str(path)} for key in ("image", "url", "path")]
    forms += [
        {
            "type": "image_url",
            "image_url": {
                "url": path.as_uri(),
            },
        },
        {"type": "image_url", "image_url": str(path), "detail": "high"},
    ]
    for form in forms:
        example = engine.encode([{"role": "user", "content": [form]}])
        np.testing.assert_array_equal(example.tokens, expected.tokens)
        np.testing.assert_array_equal(example.pictures[0].patches, expected.pictures[0].patches)
    smaller = engine.encode([{"role": "user", "content": [{"type": "image", "image": image, "max_pixels": 56 * 28}]}])
    assert len(smaller.tokens) < len(expected.tokens)


def test_tags_in_texts(engine: PromptEngine) -> None:
    first, second, video = picture(60, 60), picture(30, 90), [picture(56, 56)] * 2
    parts = [
        [
            {"type": "text", "text": "Is "},
            {"type": "image", "image": first},
            {"type": "text", "text": " like "},
            {"type": "image", "image": second},
        ],
        [{"type": "video", "video": video}, {"type": "text", "text": "\nAnd this?"}],
    ]
    expected = engine.encode([{"role": "user", "content": parts[0]}, ANSWER, {"role": "user", "content": parts[1]}])
    tagged = [{"role": "user", "content": "Is <image> like <image>"}, ANSWER, {"role": "user", "content": "<video>\nAnd this?"}]
    example = engine.encode(tagged, images=[first, second], videos=[video])
    np.testing.assert_array_equal(example.tokens, expected.tokens)
    turn = user_turn("Is <image> like <image>", [first, second])
    np.testing.assert_array_equal(engine.encode([turn]).tokens, engine.encode([{"role": "user", "content": parts[0]}]).tokens)
    before = user_turn("And this?", [first], [video])
    assert [part["type"] for part in before["content"]] == ["image", "video", "text"]
    literal = engine.encode([{"role": "user", "content": "the <image> tag"}])
    assert literal.pictures == ()


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<image> and <image>", 1, 0, "2 <image> tags for 1 images"),
        ("<image>", 2, 0, "1 <image> tags for 2 images"),
        ("none", 1, 0, "0 <image> tags for 1 images"),
        ("<image>", 1, 1, "0 <video> tags for 1 videos"),
        ("<video>", 0, 0, "1 <video> tags for 0 videos"),
        ("<video>", 1, 0, "0 <image> tags for 1 images and 1 <video> tags for 0 videos"),
    ],
)
def test_tags_that_do_not_match(engine: PromptEngine, text: str, images: int, videos: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.encode([{"role": "user", "content": text}], images=[picture(30, 30)] * images, videos=[[picture(30, 30)]] * videos)
    if "<" in text and images + videos:
        with pytest.raises(RequestError, match=message):
            user_turn(text, ["a.png"] * images, ["a.mp4"] * videos)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user"}, "a message has a role and a content"),
        ("Hi", "a message has a role and a content, not str"),
        ({"role": "user", "content": "x", "tool_calls": []}, "not tool_calls"),
        ({"role": "user<|im_end|>", "content": "x"}, "the role of a message is one word"),
        ({"role": "user", "content": 3}, "a text or a list of parts, not int"),
        ({"role": "user", "content": [{"type": "audio"}]}, "the type text, image or video"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a text its text"),
        ({"role": "user", "content": [{"type": "image"}]}, "has one of image, image_url"),
        ({"role": "user", "content": [{"type": "image", "image": "a", "url": "b"}]}, "has one of"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4", "fsp": 1}]}, "'fsp' .* did you mean 'fps'"),
        ({"role": "user", "content": [{"type": "image", "image": "none.png"}]}, "none.png does not exist"),
        ({"role": "user", "content": [{"type": "image", "image": "a.png", "max_pixels": "8"}]}, "max_pixels of a picture must be a number"),
        ({"role": "user", "content": "half \ud83e"}, "half a character"),
    ],
)
def test_messages_that_are_none(engine: PromptEngine, message: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error) as caught:
        engine.encode([message])
    assert "\n" not in str(caught.value)


def test_tags_without_pictures_are_text(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    text = "Write an HTML page with a <image> element, or a <video>"
    example = engine.encode([user_turn(text)])
    assert example.pictures == () and f"user\n{text}<|im_end|>" in tokenizer.decode(example.tokens, skip_special=False)


def test_a_tokenizer_of_another_model(backbone: BackboneConfig, tokenizer: Tokenizer, pixels: PixelConfig) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    largest = 151645  # <|im_end|>
    fitting = replace(backbone, decoder=replace(backbone.decoder, vocab=largest + 1))
    assert PromptEngine(fitting, tokenizer, pixels).encode(messages).tokens.max() == largest
    smaller = replace(backbone, decoder=replace(backbone.decoder, vocab=largest))
    with pytest.raises(RequestError, match="gives id 151645, the model has 151645 tokens: the tokenizer's files are of another model"):
        PromptEngine(smaller, tokenizer, pixels).encode(messages)


@pytest.mark.parametrize("messages", [None, 3, "Hi", {"role": "user", "content": "Hi"}])
def test_what_is_no_list_of_messages(engine: PromptEngine, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages are a list such as"):
        engine.encode(messages)


def test_no_messages(engine: PromptEngine) -> None:
    with pytest.raises(RequestError, match="no messages"):
        engine.encode([])


def test_a_prompt_past_the_length(engine: PromptEngine, backbone: BackboneConfig, tokenizer: Tokenizer, pixels: PixelConfig) -> None:
    messages = [{"role": "user", "content": "one two three"}]
    length = len(engine.encode(messages).tokens)
    assert len(PromptEngine(backbone, tokenizer, pixels, max_length=length).encode(messages).tokens) == length
    with pytest.raises(RequestError, match=f"has {length} tokens, more than the {length - 1} allowed"):
        PromptEngine(backbone, tokenizer, pixels, max_length=length - 1).encode(messages)
    short = replace(backbone, decoder=replace(backbone.decoder, max_positions=8))
    with pytest.raises(RequestError, match="more than the 8 allowed"):
        PromptEngine(short, tokenizer, pixels, max_length=100).encode(messages)


def test_templates_that_do_not_fit(backbone: BackboneConfig, tokenizer: Tokenizer, pixels: PixelConfig) -> None:
    changing = Tokenizer(tokenizer.backend, "{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    with pytest.raises(RequestError, match="changes the text of these messages"):
        PromptEngine(backbone, changing, pixels).encode([{"role": "user", "content": " x "}])
    mute = Tokenizer(tokenizer.backend, "{% if false %}x{% endif %}")
    with pytest.raises(RequestError, match="makes nothing of these messages"):
        PromptEngine(backbone, mute, pixels).encode([{"role": "user", "content": "x"}])
    blind = Tokenizer(tokenizer.backend, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(RequestError, match="writes 0 placeholders for 1 pictures"):
        PromptEngine(backbone, blind, pixels).encode([{"role": "user", "content": [{"type": "image", "image": picture(30, 30)}]}])
