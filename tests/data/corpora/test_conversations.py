"""Records of each form to turns, and which of their tokens are learned: by hand and against the masks of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blm_jax.data.chat import Tokenizer
from blm_jax.data.corpora.conversations import read_record
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.prompt_view import stretches
from blm_jax.errors import RequestError
from tests.data import reference
from tests.data.corpora.material import asked, pixels


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "image", "source": source, **settings}


def video(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "video", "source": source, **settings}


THAT = ("assistant", [text("That.")])


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (asked("<image>\nWhat?", image="a.png"), [("user", [image("a.png"), text("\nWhat?")]), THAT]),
        (asked("What?", image="a.png"), [("user", [image("a.png"), text("What?")]), THAT]),
        (asked("What?", image=["a.png"]), [("user", [image("a.png"), text("What?")]), THAT]),
        (asked("Is <image> <image>?", images=["a", "b"]), [("user", [text("Is "), image("a"), text(" "), image("b"), text("?")]), THAT]),
        (asked("<video>What?", video="a.mp4"), [("user", [video("a.mp4"), text("What?")]), THAT]),
        (asked("<video>?<image>", video="v", image="i"), [("user", [video("v"), text("?"), image("i")]), THAT]),
        (asked("<video>", video=["1.png", "2.png"]), None),  # two videos for one tag
        (asked("<video>", videos=[["1.png", "2.png"]]), [("user", [video(["1.png", "2.png"])]), THAT]),
        (asked("What?", image="", images=[], video=None), [("user", [text("What?")]), THAT]),
        (asked("What?", id=7, source="web", width=9), [("user", [text("What?")]), THAT]),
        (asked("What?", "<image> is a tag", image="a"), [("user", [image("a"), text("What?")]), ("assistant", [text("<image> is a tag")])]),
        (asked("What?", system="Be brief."), [("system", [text("Be brief.")]), ("user", [text("What?")]), THAT]),
        (
            {"conversations": [{"from": "user", "value": "Picture 1: <img>a b.png</img>\nWhat?"}, {"from": "assistant", "value": "That."}]},
            [("user", [text("Picture 1: "), image("a b.png"), text("\nWhat?")]), THAT],
        ),
        (
            {"conversations": '[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]'},
            [("user", [text("What?")]), THAT],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("What?")]},
                    {"role": "assistant", "content": [text("That.")]},
                ]
            },
            [("system", [text("Be brief.")]), ("user", [image("a.png"), text("What?")]), THAT],
        ),
        (
            [
                {"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 2.0}, text("What?")]},
                {"role": "assistant", "content": "That."},
            ],
            [("user", [video("a.mp4", fps=2.0), text("What?")]), THAT],
        ),
        (
            {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "That."}], "images": ["a.png"]},
            [("user", [image("a.png"), text("?")]), THAT],
        ),
        # Whoever writes messages of parts means a tag in a text as text.
        (
            {"messages": [{"role": "user", "content": "An <image> tag?"}, {"role": "assistant", "content": "That."}]},
            [("user", [text("An <image> tag?")]), THAT],
        ),
    ],
)
def test_forms(record: Any, turns: list[Any] | None) -> None:
    if turns is None:
        with pytest.raises(RequestError, match="1 <video> tags for 2 videos"):
            read_record(record)
    else:
        assert read_record(record) == turns


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (None, "a record is an object with conversations or messages, not None"),
        (7, "not 7"),
        ({}, r"either conversations or messages; its keys are \[\]"),
        ({"text": "x"}, r"its keys are \['text'\]"),
        ({"conversations": [], "messages": []}, "either conversations or messages"),
        ({"conversations": []}, "a list of turns, at least one"),
        ({"conversations": "[{"}, "conversations is a text that is no JSON"),
        ({"conversations": {"from": "human"}}, "a list of turns"),
        ({"conversations": ["x"]}, "a message has a role and a content"),
        ({"conversations": [{"from": "human"}]}, "a turn has from and value, which is a text"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a turn has from and value, which is a text"),
        ({"conversations": [{"value": "x"}]}, "a turn has role and content, or from and value"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "nobody knows the role 'robot'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "nobody knows the role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "the type text, image or video"),
        ({"messages": [{"role": "user", "content": [{"type": [], "image": "x"}]}]}, "the type text, image or video"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn is the assistant's"),
        (asked("What?", "  "), "an answer is empty"),
        (asked("<image> <image>", image="a"), "2 <image> tags for 1 images"),
        (asked("<image>"), "1 <image> tags for 0 images"),
        (asked("<image>", image=["a", None]), "one of them is nothing"),
        (asked("<image>", image="a", images=["b"]), "image or images, not both"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "image": "a"}, "the user says nothing"),
    ],
)
def test_records_that_are_none(record: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        read_record(record)
    assert "\n" not in str(caught.value)


# --- what is learned -----------------------------------------------------------------------------------------------------------

IM_START, IM_END, ASSISTANT, USER, LINE = 151644, 151645, 77091, 872, 198
SYSTEM = [IM_START, 8948, LINE, 2610, 525, 264, 10950, 17847, 13, IM_END, LINE]  # You are a helpful assistant.


def encode(engine: PromptEngine, record: Any) -> Any:
    messages = [
        {"role": role, "content": [{"type": part["type"], part["type"]: part["source"]} if "source" in part else part for part in parts]}
        for role, parts in read_record(record)
    ]
    return engine.encode(messages)


def test_one_answer_by_hand(engine: PromptEngine) -> None:
    example = encode(engine, asked("Hello", "Hello world"))
    user = [IM_START, USER, LINE, 9707, IM_END, LINE]
    assistant = [IM_START, ASSISTANT, LINE, 9707, 1879, IM_END, LINE]
    assert example.tokens.tolist() == SYSTEM + user + assistant
    assert np.flatnonzero(example.supervised).tolist() == [len(SYSTEM + user) + i for i in (3, 4, 5)]


def test_two_answers_and_a_picture_by_hand(engine: PromptEngine) -> None:
    turns = [("human", "<image>Hello"), ("gpt", "Hello"), ("human", "Hello world"), ("gpt", "Hello world")]
    record = {"image": pixels(56, 84), "conversations": [{"from": who, "value": value} for who, value in turns], "system": "Hello"}
    example = encode(engine, record)
    system = [IM_START, 8948, LINE, 9707, IM_END, LINE]
    first = [IM_START, USER, LINE, 151652, *[151655] * 6, 151653, 9707, IM_END, LINE]
    answer = [IM_START, ASSISTANT, LINE, 9707, IM_END, LINE]
    second = [IM_START, USER, LINE, 9707, 1879, IM_END, LINE]
    last = [IM_START, ASSISTANT, LINE, 9707, 1879, IM_END, LINE]
    assert example.tokens.tolist() == system + first + answer + second + last
    mask = [0] * len(system + first) + [0, 0, 0, 1, 1, 0] + [0] * len(second) + [0, 0, 0, 1, 1, 1, 0]
    assert example.supervised.astype(int).tolist() == mask
    learned = [stretch.text for stretch in stretches(example, engine) if stretch.learned]
    assert learned == ["Hello<|im_end|>", "Hello world<|im_end|>"]


MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
)
words = st.text(st.characters(categories=["L", "N", "P", "Zs", "So"], exclude_characters="<|>"), min_size=1, max_size=20)
answers = words.filter(lambda words: words.strip() != "" and words == words.lstrip())
rounds = st.lists(st.tuples(st.booleans(), words, answers), min_size=1, max_size=4)


@settings(max_examples=60)
@given(rounds, st.booleans())
def test_masks_are_those_of_transformers(engine: PromptEngine, model_files: Path, rounds: list[Any], system: bool) -> None:
    """Single and multi-turn, with and without pictures; the template marks its answers, which ours finds without."""
    record: dict[str, Any] = {"conversations": [], "images": []}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    if system:
        record["system"] = "Be brief."
    for number, (seen, question, answer) in enumerate(rounds):
        array = pixels(30 + 20 * number, 60, number)
        record["conversations"] += [{"from": "human", "value": "<image>" * seen + question}, {"from": "gpt", "value": answer}]
        record["images"] += [array] * seen
        parts = [{"type": "image", "image": Image.fromarray(array)}] * seen + [text(question)]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    marked = Tokenizer(engine.tokenizer.backend, MARKED, engine.tokenizer.names)
    example = encode(PromptEngine(engine.config, marked, engine.pixels), record)
    theirs: Any = reference.processor(model_files).apply_chat_template(
        messages, tokenize=True, return_dict=True, chat_template=MARKED, return_assistant_tokens_mask=True
    )
    np.testing.assert_array_equal(example.tokens, np.asarray(theirs["input_ids"][0]))
    np.testing.assert_array_equal(example.supervised, np.asarray(theirs["assistant_masks"][0]) == 1)
