"""From logits to a token: greedy, or drawn with temperature, top-k, top-p and a penalty on repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blm_jax.config import SamplingConfig

COLDEST = 1e-6  # below, drawing is taking the likeliest


@dataclass(frozen=True)
class Method:
    """What is compiled in. The numbers below are inputs, so that changing a temperature compiles nothing."""

    greedy: bool
    top_k: int | None
    nucleus: bool
    penalty: bool


class Numbers(NamedTuple):
    temperature: float | jax.Array
    top_p: float | jax.Array
    penalty: float | jax.Array


def method_of(config: SamplingConfig, vocab: int) -> tuple[Method, Numbers]:
    greedy = config.temperature < COLDEST
    top_k = None if greedy or config.top_k is None or config.top_k >= vocab else config.top_k
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    method = Method(greedy, top_k, not greedy and config.top_p < 1, penalty != 1)
    return method, Numbers(config.temperature, config.top_p, penalty)


def choose(logits: jax.Array, keys: jax.Array, seen: jax.Array | None, method: Method, numbers: Numbers) -> jax.Array:
    """logits [rows, vocab] float32, keys [rows], seen [rows, vocab] (tokens that stand in the row already) -> tokens [rows]."""
    if method.penalty:
        assert seen is not None
        logits = jnp.where(seen, jnp.where(logits > 0, logits / numbers.penalty, logits * numbers.penalty), logits)
    if method.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / numbers.temperature
    if method.top_k is None and not method.nucleus:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    # Sorted, the likeliest first. A tie at the edge of top-k goes to the lower id.
    logits, tokens = jax.lax.top_k(logits, method.top_k or logits.shape[-1])
    if method.nucleus:
        probability = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        logits = jnp.where(before < numbers.top_p, logits, -jnp.inf)
    place = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0].astype(jnp.int32)
