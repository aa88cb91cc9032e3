"""The Hub's config.json <-> BackboneConfig.

Two layouts are read: the flat one of the Hub's own files and the nested one (`text_config`, `rope_parameters`) that
transformers 5 writes. The flat one is written: every release of transformers and vLLM reads it.
"""

from __future__ import annotations

import math
from typing import Any, cast, get_args

from etils import epath

from blm_jax.config import BackboneConfig, DecoderConfig, TokenConfig, VideoPositions, VisionConfig
from blm_jax.data.files import read_json
from blm_jax.errors import RequestError

Json = dict[str, Any]
MODEL_TYPE = "qwen2_5_vl"


def read_config_json(directory: epath.Path) -> Json:
    path = directory / "config.json"
    if not path.exists():
        raise RequestError(f"{directory} has no config.json; MODEL is a Hugging Face directory or a checkpoint")
    return read_json(path)


class _Section:
    """Reads fields of one object of config.json and names the field when it is wrong."""

    def __init__(self, raw: Json, where: str):
        self.raw, self.where = raw, where

    def wrong(self, key: str, wanted: str) -> RequestError:
        return RequestError(f"{self.where}: {key} is {self.raw.get(key)!r}, but {wanted}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key, default)
        if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):  # patch sizes may be given a side each
            value = value[0]
        if value is None:
            raise RequestError(f"{self.where} has no {key}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive whole number is needed")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.wrong(key, "a number above 0 is needed")
        return float(value)

    def integers(self, key: str, default: list[int] | None = None) -> tuple[int, ...]:
        value = self.raw.get(key, default)
        if value is None:
            raise RequestError(f"{self.where} has no {key}")
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise self.wrong(key, "a list of whole numbers is needed")
        return tuple(value)

    def section(self, key: str) -> _Section:
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise RequestError(f"{self.where} has no {key}" if value is None else f"{self.where}: {key} must be an object")
        return _Section(value, f"{self.where}: {key}")

    def token(self, key: str, default: int) -> int:
        value = self.raw.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise self.wrong(key, "the id of a token is needed")
        return default if value is None else value


def from_json(raw: Json, where: str = "config.json") -> BackboneConfig:
    """What config.json says, or one line about what is not done here. Missing fields take transformers' defaults."""
    top = _Section(raw, where)
    if raw.get("model_type") != MODEL_TYPE:
        raise top.wrong("model_type", f"only {MODEL_TYPE} (Qwen2.5-VL) is known here")
    if raw.get("quantization_config"):
        raise RequestError(f"{where}: the weights are quantized (quantization_config); use the model in its original precision")
    nested = raw.get("text_config")
    text = _Section({**raw, **nested}, f"{where}: text_config") if isinstance(nested, dict) else top
    decoder = _decoder(text, tied=bool(raw.get("tie_word_embeddings") or text.raw.get("tie_word_embeddings")))
    vision = _vision(top.section("vision_config"))
    if vision.out_width != decoder.width:
        raise RequestError(f"{where}: vision_config.out_hidden_size {vision.out_width} is not the decoder's hidden_size {decoder.width}")
    defaults = TokenConfig()
    tokens = TokenConfig(
        image=top.token("image_token_id", defaults.image),
        video=top.token("video_token_id", defaults.video),
        vision_start=top.token("vision_start_token_id", defaults.vision_start),
        vision_end=top.token("vision_end_token_id", defaults.vision_end),
        pad=text.token("pad_token_id", text.token("bos_token_id", defaults.pad)),
    )
    positions = raw.get("video_positions", "blm")
    if positions not in get_args(VideoPositions):
        raise top.wrong("video_positions", f"it must be one of {', '.join(get_args(VideoPositions))}")
    return BackboneConfig(vision, decoder, tokens, cast(VideoPositions, positions))


def _decoder(text: _Section, *, tied: bool) -> DecoderConfig:
    if text.raw.get("hidden_act", "silu") != "silu":
        raise text.wrong("hidden_act", "only silu is done here")
    layer_types = text.raw.get("layer_types") or []
    if not isinstance(layer_types, list | tuple):
        raise text.wrong("layer_types", "a list of names is needed")
    if text.raw.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise RequestError(f"{text.where}: sliding-window attention is on (use_sliding_window), but only full attention is done")
    rope = text.section("rope_parameters" if isinstance(text.raw.get("rope_parameters"), dict) else "rope_scaling")
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise RequestError(f"{rope.where}: rotary embedding of type {kind!r}, but only mrope without scaling is done here")
    heads = text.integer("num_attention_heads")
    config = DecoderConfig(
        layers=text.integer("num_hidden_layers"),
        width=text.integer("hidden_size"),
        heads=heads,
        kv_heads=heads if text.raw.get("num_key_value_heads") is None else text.integer("num_key_value_heads"),
        ffn=text.integer("intermediate_size"),
        vocab=text.integer("vocab_size"),
        tied=tied,
        mrope_section=rope.integers("mrope_section"),
        rope_theta=rope.number("rope_theta", text.number("rope_theta", 1e6)),
        norm_eps=text.number("rms_norm_eps", 1e-5),
        max_positions=text.integer("max_position_embeddings", 32768),
    )
    if config.width % heads or config.head_dim % 2:
        raise text.wrong("hidden_size", f"it must be {heads} heads of an even size")
    if config.heads % config.kv_heads:
        raise text.wrong("num_key_value_heads", f"it must divide the {heads} heads")
    if len(config.mrope_section) != 3 or min(config.mrope_section) < 1:
        raise rope.wrong("mrope_section", "three whole numbers above 0 are needed: of time, height and width")
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise rope.wrong("mrope_section", f"its sum must be half of the head size {config.head_dim}")
    return config


def _vision(vision: _Section) -> VisionConfig:
    if vision.raw.get("hidden_act", "silu") != "silu":
        raise vision.wrong("hidden_act", "only silu is done here")
    config = VisionConfig(
        layers=vision.integer("depth", 32),
        width=vision.integer("hidden_size", 3584),
        heads=vision.integer("num_heads", 16),
        ffn=vision.integer("intermediate_size", 3420),
        out_width=vision.integer("out_hidden_size", 3584),
        full_attention_layers=vision.integers("fullatt_block_indexes", [7, 15, 23, 31]),
        channels=vision.integer("in_channels", vision.raw.get("in_chans", 3)),
        patch=vision.integer("patch_size", 14),
        temporal_patch=vision.integer("temporal_patch_size", 2),
        merge=vision.integer("spatial_merge_size", 2),
        window=vision.integer("window_size", 112),
        tokens_per_second=vision.integer("tokens_per_second", 4),
    )
    if config.width % config.heads or config.head_dim % 4:
        raise vision.wrong("hidden_size", f"it must be {config.heads} heads of a size that 4 divides")
    if config.window_patches < 1:
        raise vision.wrong("window_size", f"a window must hold a visual token of {config.patch * config.merge} pixels")
    if not all(0 <= block < config.layers for block in config.full_attention_layers):
        raise vision.wrong("fullatt_block_indexes", f"there are blocks 0 to {config.layers - 1}")
    return config


def to_json(config: BackboneConfig, dtype: str) -> Json:
    """A config.json for a model that came from no Hub directory. `dtype` as transformers names it: bfloat16, float32."""
    vision, decoder, tokens = config.vision, config.decoder, config.tokens
    raw: Json = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": decoder.width,
        "initializer_range": 0.02,
        "intermediate_size": decoder.ffn,
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_scaling": {"type": "mrope", "mrope_section": list(decoder.mrope_section)},
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": decoder.vocab,
        "image_token_id": tokens.image,
        "video_token_id": tokens.video,
        "vision_start_token_id": tokens.vision_start,
        "vision_end_token_id": tokens.vision_end,
        "pad_token_id": tokens.pad,
        "vision_config": {
            "depth": vision.layers,
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "hidden_act": "silu",
            "hidden_size": vision.width,
            "in_channels": vision.channels,
            "in_chans": vision.channels,
            "intermediate_size": vision.ffn,
            "num_heads": vision.heads,
            "out_hidden_size": vision.out_width,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
            "spatial_patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "tokens_per_second": vision.tokens_per_second,
            "window_size": vision.window,
        },
    }
    return with_video_positions(raw, config.video_positions)


def with_video_positions(raw: Json, positions: VideoPositions) -> Json:
    """config.json that says how text goes on after a video, where that is not our way. transformers does not mind the field."""
    kept = {key: value for key, value in raw.items() if key != "video_positions"}
    return kept if positions == "blm" else {**kept, "video_positions": positions}
