"""The loss of answers: cross-entropy that never holds the logits of all tokens."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from blm_jax.mesh import constrain

CHUNK = 2048  # tokens: fewer, and a chip reads and writes the head's slopes for longer than it multiplies


def cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, learns: bool = True, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """x [tokens, width], kernel [width, vocab], targets and weights [tokens] -> the weighted sum, and each token's loss [tokens].

    The sum has a gradient, the tokens' losses have none. It is made with the loss, chunk by chunk, so no logits are made twice:
    what softmax leaves of them is multiplied at once. `learns` false is a head that stays as it is.
    """
    return _cross_entropy(x, kernel, targets, weights, learns, chunk)  # pyright: ignore[reportReturnType]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, learns: bool, chunk: int
) -> tuple[jax.Array, jax.Array]:
    parts = _chunks(chunk, x, targets)
    _, losses = jax.lax.scan(lambda none, part: (none, _losses(*_logits(part[0], kernel), part[1])), None, parts)
    losses = losses.reshape(-1)[: len(weights)]
    return _weighed(losses, weights), losses


def _with_slopes(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, learns: bool, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None, jax.Array]]:
    def one(slopes: jax.Array | None, part: tuple[jax.Array, ...]) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array]]:
        x, targets, weights = part
        logits, level = _logits(x, kernel)
        losses = _losses(logits, level, targets)
        off = jnp.where(weights[:, None] != 0, jnp.exp(logits - level[:, None]) - _chosen(logits, targets), 0) * weights[:, None]
        off = constrain(off.astype(x.dtype), (None, "vocab"))
        if slopes is not None:
            slopes = slopes + jnp.einsum("tw,tv->wv", x, off, preferred_element_type=jnp.float32)
        return slopes, (jnp.einsum("tv,wv->tw", off, kernel), losses)

    slopes = constrain(jnp.zeros(kernel.shape, jnp.float32), (None, "vocab")) if learns else None
    slopes, (down, losses) = jax.lax.scan(one, slopes, _chunks(chunk, x, targets, weights))
    losses, down = losses.reshape(-1)[: len(weights)], down.reshape(-1, x.shape[1])[: len(weights)]
    return (_weighed(losses, weights), losses), (down, None if slopes is None else slopes.astype(kernel.dtype), kernel)


def _backward(
    learns: bool, chunk: int, kept: tuple[jax.Array, jax.Array | None, jax.Array], slopes: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    down, head, kernel = kept
    scale = slopes[0]
    return (down * scale).astype(down.dtype), jnp.zeros_like(kernel) if head is None else (head * scale).astype(head.dtype), None, None


_cross_entropy.defvjp(_with_slopes, _backward)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cut along tokens into equal parts, none longer than a chunk; the last is filled with zeros."""
    count = len(arrays[0])
    parts = -(-count // chunk)
    each = -(-count // parts)
    spare = parts * each - count
    return tuple(jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1))).reshape(parts, each, *x.shape[1:]) for x in arrays)


def _logits(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = constrain(jnp.matmul(x, kernel, preferred_element_type=jnp.float32), (None, "vocab"))
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[tokens, vocab] bool. A comparison and no gather: the vocabulary may be divided over devices."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]


def _losses(logits: jax.Array, level: jax.Array, targets: jax.Array) -> jax.Array:
    return level - jnp.sum(jnp.where(_chosen(logits, targets), logits, 0), axis=-1)


def _weighed(losses: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(weights != 0, losses * weights, 0))  # what padding's tokens lose may be anything
