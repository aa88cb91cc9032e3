"""The programs of a run, lowered for a mesh whose devices need not be there: shapes go in; nothing is made, and only configs are read."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blm_jax import mesh as meshes
from blm_jax.config import BackboneConfig, PolicyConfig, below_block
from blm_jax.counts import acting
from blm_jax.data.demos.robots import Robot, find_robot, load_robots
from blm_jax.errors import RequestError
from blm_jax.infer.act import act
from blm_jax.models.mllm import abstract_params, with_params
from blm_jax.models.policy import abstract_policy, policy_with_params
from blm_jax.plan import least, rows
from blm_jax.plan.report import Program
from blm_jax.recipe import Run, StageTwoConfig
from blm_jax.train.outline import Outline, outline
from blm_jax.train.work import WorkCount
from blm_jax.weights.policy import read_policy
from blm_jax.weights.source import read_config


def training(run: Run, mesh: Mesh) -> Program:
    """The step that `blm train` runs, and no copy of it."""
    found, row = outline_one(run, mesh) if run.stage_two is None else outline_two(run, run.stage_two, mesh)
    state = found.state()
    with meshes.use(mesh):
        step: Any = found.step()
        lowered = step.lower(state, found.frozen, rows.on(mesh, row, run.batch))
    return Program(
        name="Stage I, a step" if run.stage_two is None else "Stage II, a step",
        lowered=lowered,
        mesh=mesh,
        needed=_work(found)(row).needed,
        parameters=found.trained,
        held=held_by((state, found.frozen)),
        least=least.received(found),
        notes=_assumed(run),
    )


def outline_one(run: Run, mesh: Mesh) -> tuple[Outline, Any]:
    assert run.stage_one is not None
    backbone = backbone_of(run)
    found = outline(run, mesh, backbone, kinds={"corpus": tuple(run.stage_one.corpora)})
    return found, rows.conversation(backbone, run.stage_one.length, run.stage_one.row_length)


def outline_two(run: Run, stage_two: StageTwoConfig, mesh: Mesh) -> tuple[Outline, Any]:
    backbone, policy, robot = backbone_of(run), policy_of(run), robot_of(stage_two)
    kinds = {"action/task": tuple(one.task or one.path for one in stage_two.sets if not one.held_out)}
    cached = bool(stage_two.intents)
    found = outline(run, mesh, None if cached else backbone, policy, kinds)
    seen = rows.prompts(backbone, policy, robot, stage_two.instruction_tokens)
    dtype = jnp.dtype(run.hardware.compute.dtype)
    return found, rows.moment(policy, robot, rows.intents(seen, policy.intent_width, dtype) if cached else seen)


def _assumed(run: Run) -> tuple[str, ...]:
    if run.stage_one is None:
        return ("pictures are as large as those of the robot that has most",)
    notes = ["rows are full, one conversation each, and all tokens learned from"]
    if run.stage_one.row_length is None:
        notes.append("half of the tokens are of pictures: stage_one.row_length says otherwise")
    return tuple(notes)


def _work(found: Outline) -> WorkCount:
    run = found.run
    lora = None if run.stage_one is None else run.stage_one.lora
    ranks = {} if lora is None else {f"decoder.blocks.{name}": lora.rank for name in lora.targets}
    trained = [name for name, rate in found.rate_of.items() if rate > 0]
    return WorkCount(found.backbone, found.policy, trained=trained, ranks=ranks, remat=run.hardware.compute.remat, parts=run.batch)


def sampling(run: Run, mesh: Mesh, *, observations: int | None = None, samples: int = 1) -> Program:
    """What `blm act` runs: observations, looked at and acted on; one a device that has rows of its own where no number is asked for."""
    if run.stage_two is None:
        raise RequestError("only a run of Stage II makes a policy that acts")
    policy, compute, robot = policy_of(run), run.hardware.compute, robot_of(run.stage_two)
    below, dtype = below_block(backbone_of(run), policy), jnp.dtype(compute.dtype)
    meshes.check(below, mesh)
    seen, count = rows.prompts(below, policy, robot, run.stage_two.instruction_tokens), rows_on(mesh, observations)
    weights = abstract_params(below, dtype, mesh), abstract_policy(policy, dtype, mesh)
    models = with_params(below, compute, weights[0]), policy_with_params(policy, compute, weights[1])
    inputs = rows.on(mesh, seen, count), rows.on(mesh, rows.robot_rows(policy, robot), count)
    with meshes.use(mesh):
        program: Any = act
        lowered = program.lower(*models, *inputs, np.uint32(0), None, samples=samples, steps=policy.objective.steps)
    parts = acting(below, policy, 1, samples, rows.picture_sizes(robot, below.vision), int(seen.mask.sum()), dtype.itemsize)
    needed = count * sum(part.operations for part in parts.values())
    return Program(f"acting on {count} observations", lowered, mesh, needed, held=held_by(weights))


def rows_on(mesh: Mesh, asked: int | None) -> int:
    shards = meshes.batch_shards(mesh)
    if asked is not None and asked % shards:
        raise RequestError(f"--rows {asked}: it must be a multiple of the {shards} devices that have rows of their own (data x fsdp)")
    return asked or shards


def held_by(shapes: Any) -> int:
    """Bytes that lie on each device before and after a program runs."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


# --- what a run says -----------------------------------------------------------------------------------------------------


def backbone_of(run: Run) -> BackboneConfig:
    if run.model is not None:
        return run.model
    if not run.base:
        raise RequestError("the run names no model: give base, or the model's sizes (include a file of configs/model)")
    return read_config(run.base)


def policy_of(run: Run) -> PolicyConfig:
    assert run.stage_two is not None
    return run.stage_two.policy or read_policy(run.base).config


def robot_of(stage_two: StageTwoConfig) -> Robot:
    """Of the run's robots the one whose pictures are the most work: rows have one shape for all."""
    known = load_robots(stage_two.robots_files)
    robots = [find_robot(one.robot, known) for one in stage_two.sets]
    return max(robots, key=lambda robot: sum(camera.height * camera.width for camera in robot.cameras))
