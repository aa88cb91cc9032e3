"""config.json in the Hub's layout and in that of transformers 5."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from blm_jax.config import BackboneConfig, DecoderConfig, TokenConfig, VisionConfig
from blm_jax.errors import RequestError
from blm_jax.weights.config_json import from_json, to_json
from tests.models.oracle import CASES, torch_config

# The fields of the 7B's file, as the Hub has it.
HUB_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
CONFIG_7B = BackboneConfig(
    VisionConfig(layers=32, width=1280, heads=16, ffn=3420, out_width=3584, full_attention_layers=(7, 15, 23, 31)),
    DecoderConfig(layers=28, width=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064, tied=False),
    TokenConfig(),
)


def test_the_hubs_own_layout() -> None:
    assert from_json(HUB_7B) == CONFIG_7B


@pytest.mark.parametrize("case", CASES)
def test_the_layout_transformers_writes(case: str, tmp_path: Path) -> None:
    torch_config(CASES[case]).save_pretrained(tmp_path)
    assert from_json(json.loads((tmp_path / "config.json").read_text())) == CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_read_by_transformers_as_the_same_model(case: str, tmp_path: Path) -> None:
    raw = to_json(CASES[case], "float32")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, wanted = AutoConfig.from_pretrained(tmp_path), torch_config(CASES[case])
    assert from_json(raw) == CASES[case] == from_json(theirs.to_dict())
    for part in ("text_config", "vision_config"):
        ours, reference = getattr(theirs, part).to_dict(), getattr(wanted, part).to_dict()
        for key in ("dtype", "max_window_layers", "bos_token_id", "eos_token_id", "tie_word_embeddings"):  # of the text alone, say nothing
            ours.pop(key, None)
            reference.pop(key, None)
        if part == "text_config":
            assert ours["rope_parameters"].pop("type") == "mrope"  # beside rope_type: default, which is what counts
        assert {key: ours[key] for key in reference} == reference
    assert theirs.dtype == torch.float32 and theirs.tie_word_embeddings == wanted.tie_word_embeddings


def test_video_positions_are_kept_where_they_are_not_ours() -> None:
    other = replace(CONFIG_7B, video_positions="transformers-4.57")
    assert from_json(to_json(other, "bfloat16")) == other
    assert "video_positions" not in to_json(CONFIG_7B, "bfloat16")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llava", "model_type is 'llava', but only qwen2_5_vl"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', but only silu"),
        ("vision_config.hidden_act", "quick_gelu", "vision_config: hidden_act is 'quick_gelu'"),
        ("use_sliding_window", True, "sliding-window attention is on"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding-window attention is on"),
        ("rope_scaling.type", "yarn", "rotary embedding of type 'yarn'"),
        ("rope_scaling.mrope_section", [16, 24, 23], "its sum must be half of the head size 128"),
        ("rope_scaling", None, "has no rope_scaling"),
        ("vision_config", None, "has no vision_config"),
        ("hidden_size", None, "has no hidden_size"),
        ("hidden_size", "big", "hidden_size is 'big', but a positive whole number"),
        ("num_key_value_heads", 5, "it must divide the 28 heads"),
        ("vision_config.out_hidden_size", 2048, "out_hidden_size 2048 is not the decoder's hidden_size 3584"),
        ("quantization_config", {"bits": 4}, "the weights are quantized"),
        ("video_positions", "mine", "video_positions is 'mine'"),
        ("rope_scaling.mrope_section", [80, -8, -8], "mrope_section is [80, -8, -8], but three whole numbers above 0"),
        ("rope_scaling.mrope_section", [32, 32], "mrope_section is [32, 32], but three whole numbers above 0"),
        ("rope_theta", 0, "rope_theta is 0, but a number above 0 is needed"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan, but a number above 0 is needed"),
        ("layer_types", 3, "layer_types is 3, but a list of names is needed"),
        ("image_token_id", "a", "image_token_id is 'a', but the id of a token is needed"),
        ("pad_token_id", -1, "pad_token_id is -1, but the id of a token is needed"),
        ("vision_config.patch_size", [[14], [14]], "patch_size is [[14], [14]], but a positive whole number"),
        ("vision_config.window_size", 20, "window_size is 20, but a window must hold a visual token of 28 pixels"),
        ("vision_config.fullatt_block_indexes", [7, 99], "fullatt_block_indexes is [7, 99], but there are blocks 0 to 31"),
        ("vision_config.fullatt_block_indexes", [True], "fullatt_block_indexes is [True], but a list of whole numbers"),
    ],
)
def test_what_is_not_done_is_refused_in_one_line(path: str, value: Any, message: str) -> None:
    raw = copy.deepcopy(HUB_7B)
    *parents, key = path.split(".")
    section = raw
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[key]
    else:
        section[key] = value
    with pytest.raises(RequestError) as caught:
        from_json(raw, "MODEL/config.json")
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("MODEL/config.json")
