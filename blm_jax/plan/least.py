"""What a training step must send at least, by its weights' shapes: a yardstick for what the compiled one sends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp

from blm_jax import mesh as meshes
from blm_jax.train.optimizer import SCALES
from blm_jax.train.outline import Outline
from blm_jax.weights.names import leaves

_STACKS = ("blocks", "pairs")  # of layers, whose weights are sent when their turn comes, and once more on the way back


def received(of: Outline) -> dict[str, int]:
    """Bytes that a device receives along each axis for weights and their slopes; activations are not among them."""
    found: Counter[str] = Counter()
    width = jnp.dtype(of.run.hardware.compute.dtype).itemsize
    learned, blind = [path for path, _ in leaves(of.trained)], of.run.stage_one is not None and of.run.stage_one.row_length == 0
    trees = [(of.trained, True), (of.frozen, False), ({"slow": of.slow or {}}, False)]
    for path, leaf, trained in ((path, leaf, trained) for tree, trained in trees for path, leaf in leaves(tree)):
        if blind and path[0] == "vision":
            continue
        own = math.prod(leaf.sharding.shard_shape(leaf.shape))
        along = [axis for axis in meshes.by_weight(leaf) if axis is not None]
        sent = of.parts * own * (leaf.dtype.itemsize if path[-1] in SCALES else width)
        times = _gathers(path, trained, learned) + trained
        for axis in along:
            found[axis] += times * sent * (of.mesh.shape[axis] - 1)
        for axis in meshes.by_rows()[0] if trained else ():
            if axis not in along:
                found[axis] += 2 * own * 4 * (of.mesh.shape[axis] - 1) // of.mesh.shape[axis]
    return {axis: count for axis, count in found.items() if count}


def _gathers(path: Sequence[str], trained: bool, learned: Sequence[Sequence[str]]) -> int:
    """How often a weight is used in a step."""
    if path[0] == "backbone":
        return 2  # it looks at now and at what comes, and nothing is learned through it
    passed = trained or any(one[0] == path[0] or path[0] == "decoder" for one in learned)
    return 2 if passed and any(part in _STACKS for part in path) else 1
