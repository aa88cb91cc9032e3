"""Text generation on a mesh: prefill in length buckets, then one compiled loop that decodes until told to look up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.batch import Batch
from blm_jax.config import SamplingConfig
from blm_jax.data.collate import collate
from blm_jax.data.prompt import Example
from blm_jax.errors import RequestError
from blm_jax.infer.sampling import Method, Numbers, choose, method_of
from blm_jax.models.decoder import Cache
from blm_jax.models.mllm import Mllm


class State(NamedTuple):
    """A generation under way. Prompts fill places 0 to P - 1 of the cache, padded on the right; token i of the answer stands
    at P + i in every row, so that one slice is written a step however long the prompts are."""

    cache: Cache
    tokens: jax.Array  # [rows, new] the answers, pad after their end
    count: jax.Array  # tokens chosen so far, the same in all rows
    done: jax.Array  # [rows]
    lengths: jax.Array  # [rows] of the prompts
    positions: jax.Array  # [rows] position of the next token
    keys: jax.Array  # [rows]
    seen: jax.Array | None  # [rows, vocab] tokens that stand in prompt or answer; only for the penalty on repetition


class Stops(NamedTuple):
    ids: np.ndarray | jax.Array  # [any]
    pad: np.integer | jax.Array


def bucket(length: int, smallest: int = 64) -> int:
    """The next of 64, 96, 128, 192, 256, ...: few programs are compiled, and at most a third of a prefill is padding."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


@partial(jax.jit, static_argnames=("new", "method"))
def prefill(
    model: Mllm,
    batch: Batch,
    lengths: jax.Array,
    positions: jax.Array,
    seed: jax.Array,
    stops: Stops,
    numbers: Numbers,
    *,
    new: int,
    method: Method,
) -> State:
    rows, length = batch.tokens.shape
    logits, cache = model.prefill(batch, jnp.maximum(lengths - 1, 0), length + new)
    seen = None
    if method.penalty:
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], batch.tokens].max(batch.segments > 0)
    state = State(
        cache=cache,
        tokens=jnp.full((rows, new), stops.pad, jnp.int32),
        count=jnp.int32(0),
        done=lengths == 0,  # rows that only fill the mesh
        lengths=lengths,
        positions=positions - 1,
        # A row's noise depends on the seed and its place in the batch alone, never on the mesh.
        keys=jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows)),
        seen=seen,
    )
    return _whole(_append(state, logits, stops, numbers, method))


def _append(state: State, logits: jax.Array, stops: Stops, numbers: Numbers, method: Method) -> State:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
    chosen = choose(meshes.constrain(logits, ("batch", None)), keys, state.seen, method, numbers)
    chosen = meshes.constrain(jnp.where(state.done, stops.pad, chosen), (None,))
    rows = jnp.arange(len(chosen))
    return state._replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], state.count, axis=1),
        count=state.count + 1,
        done=state.done | jnp.isin(chosen, stops.ids),
        positions=state.positions + 1,
        seen=None if state.seen is None else state.seen.at[rows, chosen].set(True),
    )


@partial(jax.jit, static_argnames=("method",), donate_argnames=("state",))
def extend(model: Mllm, state: State, until: jax.Array, stops: Stops, numbers: Numbers, *, method: Method) -> State:
    """Go on until `until` tokens are chosen or every row is done. Streaming calls the same program with a nearer end."""
    new = state.tokens.shape[1]
    places = jnp.arange(state.cache[0].keys.shape[2])
    prompt = len(places) - new

    def going(state: State) -> jax.Array:
        return (state.count < until) & ~state.done.all()

    def step(state: State) -> State:
        at = prompt + state.count - 1  # where the last chosen token goes, now that it is read
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)[:, 0]
        seen = (places < state.lengths[:, None]) | ((places >= prompt) & (places <= at))
        logits, cache = model.decode(last, state.positions, state.cache, at, seen)
        return _append(state._replace(cache=cache), logits, stops, numbers, method)

    return _whole(jax.lax.while_loop(going, step, state))


def _whole(state: State) -> State:
    """Each process looks at the tokens, and one program's state is the next one's: small arrays lie whole on every device."""
    cache, small = state.cache, state._replace(cache=())
    small = jax.tree.map(lambda x: meshes.constrain(x, (None,) * x.ndim), small)
    return small._replace(cache=cache)


class Generator:
    """Answers batches of prompts. Compiled programs are kept by shape: the bucket of the longest prompt, the rows, the room."""

    def __init__(self, model: Mllm, mesh: Mesh | None, pad: int):
        self.model = model
        self.mesh = mesh
        self.pad = pad

    def stream(
        self, examples: Sequence[Example], sampling: SamplingConfig, stop: Iterable[int], every: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yields tokens [rows, n] chosen since the last look, pad after an answer's end; `every` tokens, or all at once."""
        if every is not None and every < 1:
            raise RequestError(f"an answer cannot be looked at every {every} tokens: it must be at least 1")
        room = self.model.config.decoder.max_positions - max(len(example.tokens) for example in examples)
        if room < 1:
            raise RequestError(f"the prompt fills all {self.model.config.decoder.max_positions} positions of the model: shorten it")
        longest = min(sampling.max_new_tokens, room)
        batch, lengths, positions = self._inputs(examples)
        method, numbers = method_of(sampling, self.model.config.decoder.vocab)
        ids = sorted({*stop, *sampling.stop})
        # As many as a multiple of eight: their number compiles in.
        stops = Stops(np.array(ids + [-1] * (-len(ids) % 8), np.int32), np.int32(self.pad))
        seed = np.uint32(sampling.seed)
        # The mesh is in use while a program is called and never while the caller has its turn.
        with meshes.use(self.mesh):
            state = prefill(self.model, batch, lengths, positions, seed, stops, numbers, new=bucket(longest, 32), method=method)
        told = 0
        while True:
            count = int(state.count)
            if count > told:
                yield np.asarray(state.tokens)[: len(examples), told:count]
                told = count
            if count >= longest or np.asarray(state.done).all():
                return
            until = longest if every is None else min(count + every, longest)
            with meshes.use(self.mesh):
                state = extend(self.model, state, np.int32(until), stops, numbers, method=method)

    def _inputs(self, examples: Sequence[Example]) -> tuple[Batch, np.ndarray, np.ndarray]:
        shards = meshes.batch_shards(self.mesh)
        # A power of two of rows a device, since their number compiles in.
        rows_each = 1 << (-(-len(examples) // shards) - 1).bit_length()
        spare = rows_each * shards - len(examples)
        rows = [[example] for example in examples] + [[] for _ in range(spare)]
        length = bucket(max(len(example.tokens) for example in examples))
        batch = collate(rows, self.model.config, length=length, row_multiple=shards)
        lengths = np.array([len(example.tokens) for example in examples] + [0] * spare, np.int32)
        positions = np.array([example.next_position for example in examples] + [0] * spare, np.int32)
        return meshes.put(batch, self.mesh), lengths, positions
