"""What `blm generate` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from blm_jax.config import HardwareConfig, SamplingConfig
from blm_jax.data.prompt import user_turn
from blm_jax.infer.session import load, open_engine
from blm_jax.mesh import make_mesh


def generate(
    *,
    model: str,
    prompt: str,
    images: Sequence[str],
    videos: Sequence[str],
    system: str | None,
    sampling: SamplingConfig,
    hardware: HardwareConfig,
    on_text: Callable[[str], None] | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append(user_turn(prompt, images, videos))
    mesh = make_mesh(hardware.mesh)
    engine = open_engine(model)
    request = engine.encode(messages, add_generation_prompt=True)
    session = load(model, mesh, hardware.compute, engine)
    loaded = time.perf_counter()
    if on_text is None:
        answer = session.generate(request, sampling)
        text, tokens = answer.text, list(answer.tokens)
    else:
        text, tokens = "", []
        for answer in session.stream(request, sampling):
            on_text(answer.text)
            text, tokens = text + answer.text, tokens + list(answer.tokens)
    return {
        "text": text,
        "tokens": tokens,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": {"load": loaded - start, "generate": time.perf_counter() - loaded},
    }
