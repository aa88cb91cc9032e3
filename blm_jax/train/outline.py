"""A run before there are weights or data: what is trained, what is frozen, where each array will lie, and the step that is compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.config import BackboneConfig, PolicyConfig, below_block
from blm_jax.configfile import suggest
from blm_jax.errors import RequestError
from blm_jax.models.embodiment import robot_rows
from blm_jax.models.mllm import abstract_params
from blm_jax.models.policy import abstract_policy
from blm_jax.recipe import Run
from blm_jax.train.optimizer import count_bytes, make_optimizer, schedule
from blm_jax.train.select import Tree, rates, split
from blm_jax.train.stages import Stage, StageOne, StageTwo
from blm_jax.train.step import Evaluation, State, Step, abstract, make_evaluation, make_step
from blm_jax.weights.adapters import ADAPTER
from blm_jax.weights.names import Path, leaves, nested

BLOCKS = ("decoder", "blocks")  # stacked parameters: a row a block
ABOVE = (("decoder", "norm"), ("decoder", "head"))  # what lies above all of them


@dataclass(frozen=True)
class Outline:
    run: Run
    mesh: Mesh
    stage: Stage
    backbone: BackboneConfig | None  # as much of it as runs
    policy: PolicyConfig | None
    trained: Tree  # shapes, float32, each with its place
    frozen: Tree  # shapes, in the dtype of products
    slow: Tree | None  # shapes of the bridge's slow copy
    rate_of: dict[str, float]
    optimizer: optax.GradientTransformation
    parts: int  # in which a step's batch is worked on
    kinds: dict[str, tuple[str, ...]]  # what entries of told vectors are of

    def state(self) -> State:
        return abstract(self.trained, self.slow, self.optimizer, self.mesh)

    def step(self) -> Step:
        run, rate = self.run, schedule(self.run.optimizer, self.run.steps)
        return make_step(self.stage, self.optimizer, self.mesh, self.state(), self.frozen, seed=run.seed, parts=self.parts, rate=rate)

    def evaluation(self) -> Evaluation:
        run = self.run
        options = run.hardware.compiler_options or None
        return make_evaluation(self.stage, self.mesh, self.state(), self.frozen, seed=run.seed, parts=self.parts, compiler_options=options)

    def describe(self) -> str:
        """What is trained and what is frozen, a line a module."""
        sizes: dict[str, list[int]] = {}
        for column, tree in enumerate((self.trained, self.frozen)):
            for path, leaf in leaves(tree):
                sizes.setdefault(_module(path), [0, 0])[column] += math.prod(leaf.shape)
        rows = [(name, *(_count(size) for size in both), _rates(name, self.rate_of)) for name, both in sorted(sizes.items())]
        totals = [sum(size[column] for size in sizes.values()) for column in (0, 1)]
        rows.append(("in all", *map(_count, totals), ""))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'':{width}}  {'trained':>9}  {'frozen':>9}  rate"]
        lines += [f"{name:{width}}  {one:>9}  {other:>9}  {rate}".rstrip() for name, one, other, rate in rows]
        moments = count_bytes(self.state().optimizer) / 1e9
        shape = " x ".join(f"{size} {axis}" for axis, size in self.mesh.shape.items())
        devices = f"{self.mesh.size} {self.mesh.devices.flat[0].device_kind}"
        lines.append(f"moments of what is trained alone: {moments:.3g} GB; mesh {shape} ({devices}); batches of {self.run.batch} rows")
        return "\n".join(lines) + (f" in {self.parts} parts" if self.parts > 1 else "")


def _module(path: tuple[str, ...]) -> str:
    return ".".join(path[: min(3 if ADAPTER in path else 2, len(path) - 1)])


def _count(size: int) -> str:
    if not size:
        return "-"
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return str(size)


def _rates(module: str, rate_of: Mapping[str, float]) -> str:
    found = sorted({rate for name, rate in rate_of.items() if rate and _module(tuple(name.split("."))) == module})
    return " ".join(f"{rate:g}" for rate in found)


def outline(
    run: Run,
    mesh: Mesh,
    backbone: BackboneConfig | None,
    policy: PolicyConfig | None = None,
    kinds: Mapping[str, tuple[str, ...]] | None = None,
) -> Outline:
    """Of Stage II, `backbone` is None where intents are made already."""
    kinds = dict(kinds or {})
    parts = _parts(run, mesh)
    if backbone is not None:
        meshes.check(backbone, mesh)
    if run.stage_one is not None:
        assert backbone is not None
        return _stage_one(run, mesh, backbone, parts, kinds)
    assert policy is not None
    return _stage_two(run, mesh, backbone, policy, parts, kinds)


def _parts(run: Run, mesh: Mesh) -> int:
    shards = meshes.batch_shards(mesh)
    if run.batch % shards:
        raise RequestError(f"batch is {run.batch}: it must be a multiple of the {shards} devices that have rows of their own (data x fsdp)")
    each = run.batch // shards
    at_once = run.hardware.rows_at_once or each
    if each % at_once:
        raise RequestError(
            f"hardware.rows_at_once is {at_once}: it must divide {each}, what each of {shards} devices has of the {run.batch} rows"
        )
    return each // at_once


def _stage_one(run: Run, mesh: Mesh, backbone: BackboneConfig, parts: int, kinds: dict[str, tuple[str, ...]]) -> Outline:
    stage_one = run.stage_one
    assert stage_one is not None
    lora = stage_one.lora
    shapes = abstract_params(backbone, jnp.float32, mesh, lora)
    names = _names(shapes)
    if lora is None:
        rate_of = rates(names, run.optimizer.modules)
    else:
        own = [name for name in names if f".{ADAPTER}." in name]
        rate_of = dict.fromkeys(names, 0.0) | rates(own, run.optimizer.modules)
    trained, frozen = split(shapes, rate_of)
    head = "decoder.embed.embedding" if backbone.decoder.tied else "decoder.head.kernel"
    compute = run.hardware.compute
    # Where nothing learns below blocks that stay, no slope is found there.
    kept = stage_one.kept_blocks if all(path[:2] in (BLOCKS, *ABOVE) for path, _ in leaves(trained)) else 0
    stage = StageOne(backbone, compute, lora, rate_of[head] > 0, len(kinds.get("corpus", ())), kept)
    optimizer = make_optimizer(run.optimizer, run.steps, rate_of, _moving(trained, stage_one.kept_blocks, backbone.decoder.layers))
    frozen = _as_computed(frozen, compute.dtype)
    return Outline(run, mesh, stage, backbone, None, trained, frozen, None, rate_of, optimizer, parts, kinds)


def _moving(trained: Tree, kept: int, layers: int) -> Tree | None:
    """Of each parameter a bool, or one a block where blocks are stacked: whether it may move."""
    if not kept:
        return None
    if kept >= layers:
        raise RequestError(f"stage_one.kept_blocks is {kept}: the decoder has {layers} blocks, and one at least has to learn")

    def moves(path: Path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[: len(BLOCKS)] != BLOCKS:
            return np.array(True)
        return np.arange(layers).reshape(-1, *(1,) * (len(leaf.shape) - 1)) >= kept

    return nested({path: moves(path, leaf) for path, leaf in leaves(trained)})


def _stage_two(
    run: Run, mesh: Mesh, backbone: BackboneConfig | None, policy: PolicyConfig, parts: int, kinds: dict[str, tuple[str, ...]]
) -> Outline:
    stage_two = run.stage_two
    assert stage_two is not None
    _check_tensor(policy, mesh)
    compute = run.hardware.compute
    shapes = {"policy": abstract_policy(policy, jnp.float32, mesh)}
    names, allowed = _names(shapes), None
    if stage_two.only:
        if stage_two.only not in policy.robots:
            raise RequestError(f"stage_two.only: the policy has no row for {stage_two.only!r}{suggest(stage_two.only, policy.robots)}")
        own = [name for name in names if name.startswith("policy.embodiments.")]
        rate_of = dict.fromkeys(names, 0.0) | rates(own, run.optimizer.modules)
        marks = robot_rows(shapes["policy"], policy.robots.index(stage_two.only))
        allowed, _ = split({"policy": marks}, rate_of)
    else:
        rate_of = rates(names, run.optimizer.modules)
    trained, frozen = split(shapes, rate_of)
    slow = shapes["policy"]["bridge"]
    below = None
    if backbone is not None:
        below = below_block(backbone, policy)
        frozen = {**frozen, "backbone": abstract_params(below, jnp.dtype(compute.dtype), mesh)}
    stage = StageTwo(below, policy, compute, len(kinds.get("action/task", ())))
    optimizer = make_optimizer(run.optimizer, run.steps, rate_of, allowed)
    return Outline(run, mesh, stage, below, policy, trained, frozen, slow, rate_of, optimizer, parts, kinds)


def _names(shapes: Tree) -> list[str]:
    return [".".join(path) for path, _ in leaves(shapes)]


def _as_computed(frozen: Tree, dtype: str) -> Tree:
    """What never changes need not be finer than products are."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding), frozen)


def _check_tensor(policy: PolicyConfig, mesh: Mesh) -> None:
    tensor = meshes.tensor_parts(mesh)
    bridge, dit = policy.bridge, policy.dit
    sizes = {
        "bridge.heads": bridge.heads,
        "bridge.ffn": bridge.ffn,
        "bridge.width": bridge.width,
        "dit.heads": dit.heads,
        "dit.ffn": dit.ffn,
    }
    sizes["dit width"] = dit.width
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tensor]
    if wrong:
        most = int(np.gcd.reduce(list(sizes.values())))
        raise RequestError(f"mesh.tensor={tensor} does not divide the policy's {', '.join(wrong)}: take a divisor of {most}, or 1")
