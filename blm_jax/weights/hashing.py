"""The SHA-256 of every tensor of the Hub's layout, and the fingerprint they make together."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from blm_jax.weights.form import Source
from blm_jax.weights.names import Slices, Tensor, hub_tensors, pieces
from blm_jax.weights.safetensors_file import CODES

Piece = tuple[Tensor, Slices, np.ndarray]


def fingerprint_of(source: Source, *, show: bool = False) -> str:
    """Reads all of it, a few pieces at a time."""
    tensors = hub_tensors(source.entries)
    digests: dict[str, bytes] = {}
    with progress(source, tensors, "fingerprint", show=show) as bar:
        for _ in hashed_pieces(source, tensors, digests, bar):
            pass
    return combine(source, digests)


def combine(source: Source, digests: Mapping[str, bytes]) -> str:
    """The fingerprint, from the SHA-256 of every tensor."""
    lines = [
        f"{tensor.name} {CODES[source.dtype_of(tensor)]} {list(tensor.entry.hub_shape)} {digests[tensor.name].hex()}\n"
        for tensor in sorted(hub_tensors(source.entries), key=lambda tensor: tensor.name)
    ]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def tensor_bytes(source: Source, tensor: Tensor) -> int:
    return math.prod(tensor.entry.block) * source.dtype_of(tensor).itemsize


def progress(source: Source, tensors: Sequence[Tensor], what: str, *, show: bool) -> tqdm:
    total = sum(tensor_bytes(source, tensor) for tensor in tensors)
    # None: shown on a terminal only.
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None if show else True, leave=False, mininterval=1)


def hashed_pieces(source: Source, tensors: Sequence[Tensor], digests: dict[str, bytes], bar: tqdm) -> Iterator[Piece]:
    """The tensors piece by piece in the Hub's order, read a little ahead. Puts the SHA-256 of each tensor into `digests`."""
    # Pieces are cut for the dtype of the stack, so that they are the files of a checkpoint's arrays.
    jobs = ((tensor, part) for tensor in tensors for part in pieces(tensor.entry.block, source.dtype(tensor.entry).itemsize))
    hashes = {tensor.name: hashlib.sha256() for tensor in tensors}
    ahead: deque[tuple[Tensor, Slices, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(source.readers()) as pool:

        def refill() -> None:
            while len(ahead) < source.readers() and (job := next(jobs, None)) is not None:
                ahead.append((*job, pool.submit(_read, source, *job)))

        refill()
        while ahead:
            tensor, part, future = ahead.popleft()
            block = future.result()
            refill()
            hashes[tensor.name].update(block.view(np.uint8).data)
            yield tensor, part, block
            bar.update(block.nbytes)
    digests.update({name: value.digest() for name, value in hashes.items()})


def _read(source: Source, tensor: Tensor, part: Slices) -> np.ndarray:
    return source.read_tensor(tensor, part).copy()  # copied here, so that a mapped file is read in this thread
