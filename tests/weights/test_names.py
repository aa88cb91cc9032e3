"""Pieces and files: the cutting that bounds memory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from blm_jax.weights import names, safetensors_file

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(1, 200))
def test_pieces_are_contiguous_ordered_and_small(shape: tuple[int, ...], limit: int) -> None:
    flat = np.arange(math.prod(shape)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "PIECE_BYTES", limit)
        cut = [flat[part] for part in names.pieces(shape, 2)]
        step = names.piece_shape(shape, 2)
    assert np.array_equal(np.concatenate([piece.ravel() for piece in cut]), flat.ravel())
    assert all(piece.size * 2 <= max(limit, 2) for piece in cut)
    # A regular grid: what a zarr array is made of.
    assert len(cut) == math.prod(-(-size // length) for size, length in zip(shape, step, strict=True))


@given(shapes, st.data())
def test_a_slice_of_a_file_is_numpys(shape: tuple[int, ...], data: st.DataObject) -> None:
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    slices = tuple(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(sorted).filter(lambda p: p[0] < p[1])) for n in shape)
    index = tuple(slice(*pair) for pair in slices)
    path = Path(_FOLDER) / "value.safetensors"
    save_file({"before": np.ones(3, np.uint8).view(np.uint8).astype(np.float32), "value": value}, path)
    stored = safetensors_file.read_header(epath.Path(path))["value"]
    for local in (True, False):  # mapped, and as in a bucket
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(safetensors_file, "is_local", lambda _, local=local: local)
            assert np.array_equal(safetensors_file.read_block(stored, shape, index), value[index])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 120), st.data())
def test_planned_files_hold_everything_in_order_and_keep_to_the_limit(sizes: list[int], limit: int, data: st.DataObject) -> None:
    dtypes = [data.draw(st.sampled_from(list(safetensors_file.CODES))) for _ in sizes]
    tensors = {f"t{i}": (dtype, (size,)) for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))}
    plan = safetensors_file.plan_files(tensors, limit)
    assert sorted(itertools.chain.from_iterable(file.tensors for file in plan)) == sorted(tensors)
    assert all(file.data_bytes <= limit or len(file.tensors) == 1 for file in plan)
    for file in plan:  # every number lies where its size divides the address
        start = len(file.header())
        for dtype, shape in file.tensors.values():
            assert start % dtype.itemsize == 0
            start += dtype.itemsize * math.prod(shape)


_FOLDER = ""


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _FOLDER
    _FOLDER = str(tmp_path_factory.mktemp("slices"))
