"""The reference: transformers' Qwen2.5-VL in PyTorch with small random sizes, and its weights in our tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from blm_jax.config import BackboneConfig, DecoderConfig, TokenConfig, VisionConfig

# Small ids, so that a vocabulary of a few hundred holds them.
TOKENS = TokenConfig(image=301, video=302, vision_start=303, vision_end=304, pad=300)
VOCAB = 320


def _vision(**changes: Any) -> VisionConfig:
    sizes: dict[str, Any] = dict(layers=4, width=32, heads=2, ffn=44, out_width=64, full_attention_layers=(1, 3), window=112)
    return VisionConfig(**(sizes | changes))


def _decoder(**changes: Any) -> DecoderConfig:
    sizes: dict[str, Any] = dict(layers=3, width=64, heads=4, kv_heads=2, ffn=96, vocab=VOCAB, tied=False, mrope_section=(2, 3, 3))
    return DecoderConfig(**(sizes | changes))


CASES = {
    "plain": BackboneConfig(_vision(), _decoder(), TOKENS),
    "tied": BackboneConfig(_vision(), _decoder(tied=True), TOKENS),
    "one key head": BackboneConfig(_vision(), _decoder(kv_heads=1), TOKENS),
    "as many key heads, other sections": BackboneConfig(_vision(), _decoder(kv_heads=4, mrope_section=(4, 2, 2), tied=True), TOKENS),
    "irregular vision layers, small windows": BackboneConfig(
        _vision(layers=5, full_attention_layers=(0, 3), window=56, patch=14, heads=4, width=48, ffn=51), _decoder(layers=2), TOKENS
    ),
    "odd patches, windows of three cells, all full": BackboneConfig(
        _vision(layers=2, full_attention_layers=(0, 1), patch=7, window=42, width=40, heads=1, ffn=33, out_width=96, tokens_per_second=4),
        _decoder(width=96, heads=6, kv_heads=3, ffn=70, rope_theta=1e4, norm_eps=1e-5),
        TOKENS,
    ),
    "no full attention": BackboneConfig(_vision(layers=3, full_attention_layers=(), window=84), _decoder(layers=1), TOKENS),
}


def torch_config(config: BackboneConfig) -> Qwen2_5_VLConfig:
    text, vision, tokens = config.decoder, config.vision, config.tokens
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=text.vocab,
            hidden_size=text.width,
            intermediate_size=text.ffn,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            hidden_act="silu",
            max_position_embeddings=text.max_positions,
            rms_norm_eps=text.norm_eps,
            use_sliding_window=False,
            rope_parameters=dict(rope_type="default", rope_theta=text.rope_theta, mrope_section=list(text.mrope_section)),
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokens.pad,
            tie_word_embeddings=text.tied,
        ),
        vision_config=dict(
            depth=vision.layers,
            hidden_size=vision.width,
            hidden_act="silu",
            intermediate_size=vision.ffn,
            num_heads=vision.heads,
            in_channels=vision.channels,
            patch_size=vision.patch,
            spatial_merge_size=vision.merge,
            temporal_patch_size=vision.temporal_patch,
            tokens_per_second=vision.tokens_per_second,
            window_size=vision.window,
            out_hidden_size=vision.out_width,
            fullatt_block_indexes=list(vision.full_attention_layers),
        ),
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start,
        vision_end_token_id=tokens.vision_end,
        tie_word_embeddings=text.tied,
    )


def torch_model(config: BackboneConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Random in every tensor, biases and norms too, at a scale where each of them matters."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(torch_config(config)).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.2)
            elif value.ndim == 1:
                value.normal_(1, 0.2)
            else:
                fan_in = value[0].numel()
                value.normal_(0, fan_in**-0.5)
    return model


def params_of(model: Qwen2_5_VLForConditionalGeneration, config: BackboneConfig) -> dict[str, Any]:
    """The reference's weights in our tree, written out by hand: an oracle for the table of names too."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return tree_of(state, config)


def grads_of(model: Qwen2_5_VLForConditionalGeneration, config: BackboneConfig) -> dict[str, Any]:
    grads = {name: (torch.zeros_like(value) if value.grad is None else value.grad).numpy() for name, value in model.named_parameters()}
    return tree_of(grads, config)


def tree_of(state: dict[str, np.ndarray], config: BackboneConfig) -> dict[str, Any]:
    text, vision = config.decoder, config.vision

    def layers(count: int, prefix: str, name: str, *shape: int) -> np.ndarray:
        """Stacked, with [out, in] turned into [in, out] where there are two axes."""
        each = [state[f"{prefix}.{i}.{name}"] for i in range(count)]
        return np.stack([(value.T if value.ndim == 2 else value).reshape(shape or value.T.shape) for value in each])

    def linear(count: int, prefix: str, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool) -> dict[str, np.ndarray]:
        leaf = {"kernel": layers(count, prefix, f"{name}.weight", *inputs, *outputs)}
        return leaf | ({"bias": layers(count, prefix, f"{name}.bias", *outputs)} if bias else {})

    def whole(name: str) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    v, w, heads = "model.visual.blocks", (vision.width,), (vision.heads, vision.head_dim)
    d, x, q, k = "model.language_model.layers", (text.width,), (text.heads, text.head_dim), (text.kv_heads, text.head_dim)
    patch = state["model.visual.patch_embed.proj.weight"]
    decoder = {
        "embed": {"embedding": state["model.language_model.embed_tokens.weight"]},
        "blocks": {
            "attn_norm": {"scale": layers(text.layers, d, "input_layernorm.weight")},
            "q": linear(text.layers, d, "self_attn.q_proj", x, q, True),
            "k": linear(text.layers, d, "self_attn.k_proj", x, k, True),
            "v": linear(text.layers, d, "self_attn.v_proj", x, k, True),
            "out": linear(text.layers, d, "self_attn.o_proj", q, x, False),
            "ffn_norm": {"scale": layers(text.layers, d, "post_attention_layernorm.weight")},
            "gate": linear(text.layers, d, "mlp.gate_proj", x, (text.ffn,), False),
            "up": linear(text.layers, d, "mlp.up_proj", x, (text.ffn,), False),
            "down": linear(text.layers, d, "mlp.down_proj", (text.ffn,), x, False),
        },
        "norm": {"scale": state["model.language_model.norm.weight"]},
    }
    if not text.tied:
        decoder["head"] = {"kernel": state["lm_head.weight"].T}
    return {
        "vision": {
            "patch_embed": {"kernel": patch.reshape(patch.shape[0], -1).T},
            "blocks": {
                "attn_norm": {"scale": layers(vision.layers, v, "norm1.weight")},
                "qkv": linear(vision.layers, v, "attn.qkv", w, (3, *heads), True),
                "out": linear(vision.layers, v, "attn.proj", heads, w, True),
                "ffn_norm": {"scale": layers(vision.layers, v, "norm2.weight")},
                "gate": linear(vision.layers, v, "mlp.gate_proj", w, (vision.ffn,), True),
                "up": linear(vision.layers, v, "mlp.up_proj", w, (vision.ffn,), True),
                "down": linear(vision.layers, v, "mlp.down_proj", (vision.ffn,), w, True),
            },
            "merger": {
                "norm": {"scale": state["model.visual.merger.ln_q.weight"]},
                "inner": whole("model.visual.merger.mlp.0"),
                "outer": whole("model.visual.merger.mlp.2"),
            },
        },
        "decoder": decoder,
    }
