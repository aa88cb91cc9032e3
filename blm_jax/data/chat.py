"""Text to token ids and back, by the model's own tokenizer files and chat template."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from etils import epath
from jinja2 import nodes
from jinja2.parser import Parser
from tokenizers import decoders, models, normalizers, pre_tokenizers

from blm_jax.data.files import one_line, read_json, read_text
from blm_jax.errors import RequestError

# How Qwen2 cuts text into words; needed only where the files hold a vocabulary and merges but no tokenizer.json.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A byte-level tokenizer and its chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str | None = None, names: Mapping[str, str] | None = None):
        # `names`: what the files call eos_token, pad_token and so on; templates may ask for them.
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise RequestError(f"the tokenizer decodes by {type(backend.decoder).__name__}; only byte-level tokenizers are known")
        self.backend = backend
        self.template = template
        self.names = dict(names or {})
        self.added = dict(backend.get_added_tokens_decoder())
        self.special_ids = frozenset(index for index, token in self.added.items() if token.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos = self._id_of_name("eos_token")
        self.pad = self._id_of_name("pad_token")

    def _id_of_name(self, name: str) -> int | None:
        return self.backend.token_to_id(self.names[name]) if name in self.names else None

    def token_id(self, text: str) -> int:
        index = self.backend.token_to_id(text)
        if index is None:
            raise RequestError(f"the tokenizer has no token {text!r}: are its files of another model?")
        return index

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which the names of added tokens mean these tokens."""
        check_text(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, in which no name of an added token means that token."""
        check_text(text)
        text = self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text
        words = [word for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)] if self.backend.pre_tokenizer else [text]
        return [token.id for word in words for token in self.backend.model.tokenize(word)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        return TextStream(self, skip_special)

    def bytes_of(self, index: int) -> bytes:
        """What a token adds to the text. An id that is no token (the padding of the vocabulary) adds nothing."""
        token = self.backend.id_to_token(index)
        if token is None:
            return b""
        values = [BYTE_OF_LETTER.get(letter) for letter in token]
        # A name with a letter outside the byte alphabet (an added token with a space, say) stands for itself.
        return token.encode() if None in values else bytes(value for value in values if value is not None)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The chat as one text, by the template."""
        if self._compiled is None:
            raise RequestError("the model directory has no chat template: add chat_template.jinja, as the Hub has it")
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **self.names)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"the chat template refuses these messages: {one_line(error)}") from error

    @cached_property
    def _compiled(self) -> jinja2.Template | None:
        if self.template is None:
            return None
        try:
            return template_environment().from_string(self.template)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template cannot be read: {one_line(error)}") from error

    @cached_property
    def template_tokens(self) -> frozenset[int]:
        """The added tokens that the template itself writes: those which make the structure of a chat."""
        if self.template is None:
            return frozenset()
        tree = template_environment().parse(self.template)
        literals = [node.data for node in tree.find_all(nodes.TemplateData)]
        literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return frozenset(index for index, token in self.added.items() if any(token.content in text for text in literals))


class TextStream:
    """Text of tokens that come one by one. A character is given out when its last byte is there, and never in part."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The characters that `index` completes; often none."""
        index = int(index)
        if self._skip_special and index in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(index))

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that stayed incomplete."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """The tokenizer and chat template of a model directory, local or in a bucket."""
    directory = epath.Path(directory)
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").exists() else {}
    if (directory / "tokenizer.json").exists():
        path = directory / "tokenizer.json"
        text = read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises bare Exception
            raise RequestError(f"{path} cannot be read as a tokenizer: {one_line(error)}") from error
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        backend = backend_from_merges(directory, settings)
    else:
        raise RequestError(f"{directory} has no tokenizer: it wants tokenizer.json, or vocab.json and merges.txt")
    names = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    return Tokenizer(backend, read_template(directory, settings), names)


def backend_from_merges(directory: epath.Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of Qwen2 from its older files."""
    vocabulary = read_json(directory / "vocab.json")
    lines = read_text(directory / "merges.txt").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise RequestError(f"{directory / 'merges.txt'}: every line must hold two parts of a token")
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))  # type: ignore[arg-type]
    except Exception as error:  # the package raises bare Exception
        raise RequestError(f"{directory}: vocab.json and merges.txt do not fit each other: {one_line(error)}") from error
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    added = settings.get("added_tokens_decoder", {})
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    # Ids are given out in order: the files number added tokens right behind the vocabulary.
    for index, token in sorted(added.items(), key=lambda item: int(item[0])):
        backend.add_tokens([tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})])
        if backend.token_to_id(token["content"]) != int(index):
            raise RequestError(f"{directory}: added token {token['content']!r} wants id {index}, which does not follow the vocabulary")
    return backend


def read_template(directory: epath.Path, settings: Mapping[str, Any]) -> str | None:
    """The newest of the three places where a model keeps its chat template."""
    if (directory / "chat_template.jinja").exists():
        return read_text(directory / "chat_template.jinja")
    template = settings.get("chat_template")
    if (directory / "chat_template.json").exists():
        template = read_json(directory / "chat_template.json").get("chat_template")
    try:
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (KeyError, TypeError):
        template = False
    if not isinstance(template, str | None):
        raise RequestError(f"{directory}: chat_template must be a text, or a list of objects with a name and a template")
    return template


def template_environment() -> jinja2.Environment:
    """What chat templates are written for: transformers' settings and additions. They come with weights, so they run in a sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, by which some templates mark answers: rendered as what is inside."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def check_text(text: str) -> None:
    if half := re.search("[\ud800-\udfff]", text):
        raise RequestError(f"the text has half a character (U+{ord(half.group()):04X}) at {half.start()}: it was cut or decoded wrongly")


def byte_of_letter() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others for the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(0x100 + i): value for i, value in enumerate(others)}


BYTE_OF_LETTER = byte_of_letter()
