"""What `blm generate` and `blm act` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.config import HardwareConfig, MeshConfig, SamplingConfig
from blm_jax.data.demos.observation import check, check_last, check_output, read_last, read_observations, write_chunks
from blm_jax.data.demos.robots import check_stored
from blm_jax.data.prompt import PromptEngine, user_turn
from blm_jax.infer.act import load_actor
from blm_jax.infer.session import load
from blm_jax.mesh import make_mesh
from blm_jax.weights.engine import open_engine
from blm_jax.weights.policy import read_policy


def generate(
    *,
    model: str,
    prompt: str,
    images: Sequence[str],
    videos: Sequence[str],
    system: str | None,
    sampling: SamplingConfig,
    hardware: HardwareConfig,
    backbone: str | None,
    on_text: Callable[[str], None] | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append(user_turn(prompt, images, videos))
    engine = open_engine(model)
    mesh = _mesh(hardware, engine)
    request = engine.encode(messages, add_generation_prompt=True)
    session = load(model, mesh, hardware.compute, engine, backbone)
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


def _mesh(hardware: HardwareConfig, engine: PromptEngine) -> Mesh:
    """As asked for; the default, which suits training, stands for what suits answering."""
    return make_mesh(meshes.serving(engine.config) if hardware.mesh == MeshConfig() else hardware.mesh)


def act(
    *,
    model: str,
    observations: str,
    robot: str,
    robots_files: Sequence[str],
    samples: int,
    steps: int | None,
    seed: int,
    last: str | None,
    delay: int,
    out: str,
    hardware: HardwareConfig,
    backbone: str | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    check_output(out)
    seen = read_observations(observations)
    files = read_policy(model)
    check_stored(files.robots, robots_files)
    known = files.find(robot)
    for observation in seen:
        check(observation, known)
    left = None if last is None else read_last(last, known)
    check_last(left, delay, [known] * len(seen), samples, files.config.objective.prefix)
    engine = open_engine(model)
    actor = load_actor(model, _mesh(hardware, engine), hardware.compute, engine, backbone)
    loaded = time.perf_counter()
    chunks = np.stack(actor.sample_actions(seen, [robot] * len(seen), samples=samples, seed=seed, steps=steps, last=left, delay=delay))
    if jax.process_index() == 0:
        write_chunks(out, chunks, known)
    return {
        "path": out,
        "observations": len(seen),
        "samples": samples,
        "horizon": chunks.shape[2],
        "dimensions": [dimension.name for dimension in known.action],
        "seconds": {"load": loaded - start, "act": time.perf_counter() - loaded},
    }
