"""The tokenizer and the chat template against transformers, and text that comes token by token."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from blm_jax.data.chat import Tokenizer, load_tokenizer
from blm_jax.errors import RequestError
from tests.qwen_files import CHAT_TEMPLATE, tokenizer_config, tokenizer_json

MESSAGES = [{"role": "user", "content": "Hi <b>&'\" é"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def reference(model_files: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_files)


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello") == [9707]
    assert tokenizer.encode(" world") == [1879]
    assert tokenizer.encode("You are a helpful assistant.") == [2610, 525, 264, 10950, 17847, 13]
    assert (tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (151645, 151643, 151665)
    assert tokenizer.token_id("<|image_pad|>") == 151655


@given(st.text())
def test_text_to_ids_and_back(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids)
    assert tokenizer.encode_plain(text) == reference._encode_without_added_tokens(text)


def test_names_of_tokens_can_be_plain_text(tokenizer: Tokenizer) -> None:
    text = "<|im_end|> <tool_call>"
    assert tokenizer.encode(text) == [151645, 220, 151657]
    assert max(tokenizer.encode_plain(text)) < 151643
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text


@given(st.lists(st.integers(0, 151664) | st.sampled_from([151643, 151645, 151657, 151660]), max_size=30), st.booleans())
@example([2621, 149, 242, 9707], True)
def test_text_token_by_token(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """The pieces make the whole, whatever bytes the tokens hold, and no piece ends within a character."""
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(index) for index in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), max_size=20))
def test_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode(text)
    pieces = [stream.push(index) for index in ids]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole
    assert stream.finish() == ""
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_of_several_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦜")
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(index) for index in ids] == [""] * (len(ids) - 1) + ["🦜"]
    broken = tokenizer.stream()
    broken.push(ids[0])
    assert broken.finish() == "\ufffd"


def test_ids_of_the_padded_vocabulary_add_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.stream().push(151_900) == ""


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_template_renders_as_in_transformers(tokenizer: Tokenizer, reference: Any, add_generation_prompt: bool) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "video"}]
    for messages in (MESSAGES, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert tokenizer.render(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n{{ m.content }}\n{% break %}{% endfor %}",
        "{{ eos_token }}{{ pad_token }}{% if bos_token is defined and bos_token %}x{% endif %}",
        "{{ strftime_now('%Y') }}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ dict(a=1) }}",
    ],
)
def test_what_templates_may_use(tokenizer: Tokenizer, reference: Any, template: str) -> None:
    ours = Tokenizer(tokenizer.backend, template, tokenizer.names).render(MESSAGES)
    assert ours == reference.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
    assert ours != "" and ("%Y" not in template or ours == str(datetime.now().year))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only\none turn') }}", "refuses these messages: only one turn"),
        ("{{ messages[9].content.upper() }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute '__class__'"),
        ("{% if %}", "cannot be read"),
        (None, "has no chat template"),
    ],
)
def test_bad_templates(tokenizer: Tokenizer, template: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        Tokenizer(tokenizer.backend, template).render(MESSAGES)
    assert "\n" not in str(caught.value)


def test_older_files_make_the_same_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config() | {"chat_template": CHAT_TEMPLATE}))
    older = load_tokenizer(tmp_path)
    text = "Hello <|im_start|> wörld 123\n\n  <tool_call>{}"
    assert older.encode(text) == tokenizer.encode(text)
    assert older.decode(older.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (older.eos, older.special_ids, older.vocab_size) == (tokenizer.eos, tokenizer.special_ids, tokenizer.vocab_size)
    assert older.render(MESSAGES) == tokenizer.render(MESSAGES)


def test_the_newest_place_of_the_template_wins(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_tokenizer(tmp_path).render(MESSAGES) == "D"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert load_tokenizer(tmp_path).render(MESSAGES) == "J"
    (tmp_path / "chat_template.jinja").write_text("N")
    assert load_tokenizer(tmp_path).render(MESSAGES) == "N"


@pytest.mark.parametrize("template", [[{"template": "T"}], [{"name": "default"}], ["T"], [{"name": [], "template": "T"}], 3])
def test_templates_of_another_kind(tmp_path: Path, model_files: Path, template: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_files / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(RequestError, match="chat_template must be a text, or a list of objects with a name and a template"):
        load_tokenizer(tmp_path)


def test_directories_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no tokenizer: it wants tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    with pytest.raises(RequestError, match="only byte-level tokenizers"):
        load_tokenizer(tmp_path)


def test_a_token_of_another_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"no token '<\|other\|>'"):
        tokenizer.token_id("<|other|>")


def test_half_a_character_in_a_text(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_plain):
        with pytest.raises(RequestError, match=r"half a character \(U\+D83E\) at 3"):
            encode("abc\ud83e")


def test_ids_may_be_numpy(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(np.array([9707, 1879], np.int32)) == "Hello world"
