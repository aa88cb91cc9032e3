"""Both stages on a mesh, small and without files: a state, a step, and batches of which rows weigh very unequally."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.batch import Batch, Moments
from blm_jax.config import ComputeConfig, MeshConfig, PolicyConfig
from blm_jax.data.collate import collate
from blm_jax.models.mllm import abstract_params
from blm_jax.models.policy import abstract_policy
from blm_jax.recipe import OptimizerConfig
from blm_jax.train.optimizer import make_optimizer
from blm_jax.train.select import Tree, rates, split
from blm_jax.train.stages import Stage, StageOne, StageTwo, Told
from blm_jax.train.step import Report, State, Step, begin, make_step, mean
from blm_jax.weights.names import leaves, nested
from tests.models.chats import IMAGE, IMAGES, TEXT, VIDEO, make_example
from tests.models.oracle import CASES
from tests.models.policies import make_inputs, small

CONFIG = CASES["plain"]
ROWS = 8
POLICY = replace(small(objective={"prefix": 2, "draws": 2}, dit={"dropout": 0.2}, embodiment={"state_dropout": 0.3}), horizon=7)


@cache
def conversations(seed: int) -> Batch:
    """Two thirds of the rows answer with one token, or with none at all; the longest of them with a hundred."""
    rng = np.random.default_rng(seed)
    kinds = [TEXT, IMAGE, IMAGES, VIDEO]
    whole = 100 * seed
    rows = [[make_example(CONFIG, kinds[(i + seed) % 4], whole + i), make_example(CONFIG, TEXT, whole + 50 + i)] for i in range(ROWS)]
    batch = collate(rows, CONFIG, length=192, vision_row_length=8 * CONFIG.vision.window_patches)
    weights = batch.weights.copy()
    for i in range(ROWS):
        if i % 3:
            own = np.flatnonzero(weights[i])
            weights[i, own[rng.integers(0, 2) :]] = 0
    sources = np.where(batch.segments > 0, batch.segments - 1, -1).astype(np.int32)
    return replace(batch, weights=weights, sources=sources)


@cache
def moments(seed: int) -> Moments:
    made = make_inputs(POLICY, ROWS, 11, seed=seed)
    mask = made.chunks.mask.copy()
    mask[::3, 1:] = False
    mask[1::5] = False
    chunks = replace(made.chunks, mask=mask)
    return Moments(made.robots, chunks, made.has_future, made.intent, made.future, np.arange(ROWS, dtype=np.int32) % 2)


def random_tree(shapes: Tree, seed: int = 0) -> Tree:
    """Of NumPy arrays, far from initial weights, so that everything has its effect."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        fan = 0.15 if len(shape) < 3 else min(0.3, float(np.prod(shape[1:-1])) ** -0.5)
        return ((path[-1] == "scale") + fan * rng.standard_normal(shape)).astype(np.float32)

    return nested({path: leaf(path, one.shape) for path, one in leaves(shapes)})


@dataclass
class Run:
    """A run's state on a mesh, and how it goes on."""

    mesh: Mesh
    stage: Stage
    state: State
    frozen: Tree
    step: Step
    batches: Callable[[int], Any]

    def go(self, steps: int, start: int = 0) -> list[Report]:
        reports = []
        with meshes.use(self.mesh):
            for number in range(start, start + steps):
                batch = meshes.put(self.batches(number), self.mesh)
                self.state, report = self.step(self.state, self.frozen, batch)
                reports.append(jax.device_get(report))
        return reports


COMPUTE = ComputeConfig()
OPTIMIZER = OptimizerConfig(rate=3e-3, warmup=0.1, betas=(0.9, 0.95), weight_decay=0.01)


def place(tree: Tree, shapes: Tree) -> Tree:
    return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), tree, shapes)


def start(
    which: int,
    mesh: Mesh,
    *,
    parts: int = 1,
    steps: int = 40,
    compute: ComputeConfig = COMPUTE,
    config: OptimizerConfig = OPTIMIZER,
    policy: PolicyConfig = POLICY,
    batches: Callable[[int], Any] | None = None,
) -> Run:
    if which == 1:
        shapes = abstract_params(CONFIG, jnp.float32, mesh)
        stage: Stage = StageOne(CONFIG, compute, corpora=2)
        given = batches or (lambda number: conversations(number % 4))
    else:
        shapes = {"policy": abstract_policy(policy, jnp.float32, mesh)}
        stage = StageTwo(None, policy, compute, tasks=2)
        given = batches or (lambda number: moments(number % 4))
    rate_of = rates([".".join(path) for path, _ in leaves(shapes)], config.modules)
    trained, frozen = split(place(random_tree(shapes), shapes), rate_of)
    optimizer = make_optimizer(config, steps, rate_of)
    state = begin(trained, trained.get("policy", {}).get("bridge"), optimizer, mesh)
    return Run(mesh, stage, state, frozen, make_step(stage, optimizer, mesh, state, frozen, seed=5, parts=parts), given)


def losses(told: Told) -> dict[str, float]:
    return {name: float(mean(share)) for name, share in told.items() if np.ndim(share.sum) == 0}


def make_mesh(*sizes: int) -> Mesh:
    return meshes.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
