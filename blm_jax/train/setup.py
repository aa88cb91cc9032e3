"""A run, opened: its base's weights, its data, and all that a checkpoint says beside them."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from blm_jax.config import BackboneConfig, LoraConfig, PolicyConfig
from blm_jax.data.corpora.packed import PackedRows, open_packed
from blm_jax.data.demos.demonstrations import Demonstrations, open_demonstrations
from blm_jax.data.demos.intents import open_intents
from blm_jax.data.demos.moments import Augmentation, MomentRows, open_moments
from blm_jax.data.demos.robots import Robot, find_robot, load_robots
from blm_jax.data.demos.statistics import Statistics
from blm_jax.data.demos.survey import Survey, read_survey
from blm_jax.data.files import one_line, open_path, read_json, write_whole
from blm_jax.data.loader import Rows
from blm_jax.data.vision.augment import AugmentConfig
from blm_jax.errors import RequestError
from blm_jax.models.embodiment import add_robot
from blm_jax.models.mllm import Mllm, adapted
from blm_jax.models.policy import abstract_policy, random_policy
from blm_jax.recipe import ChangesConfig, Run, SetConfig, StageOneConfig, StageTwoConfig
from blm_jax.train.outline import Outline, outline
from blm_jax.train.select import Tree, joined, split
from blm_jax.weights.adapters import ADAPTER
from blm_jax.weights.engine import open_engine
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.hub import asset_names
from blm_jax.weights.load import load_params
from blm_jax.weights.names import leaves, nested
from blm_jax.weights.policy import PolicyFiles, check_backbone, contract, has_policy, load_policy_params, read_policy
from blm_jax.weights.source import assets_dir, read_config
from blm_jax.weights.trained import describe_base, newest_of_run, stamp

BASE = "base.json"  # of a run: which weights it began from
MESSAGE = 4096  # bytes that process 0 tells the others
PACKAGES = ("blm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Opened:
    """Nothing large is read yet."""

    outline: Outline
    rows: Rows[Any]
    held_out: Rows[Any] | None
    identity: dict[str, Any]  # of the data and its order: another makes another run
    assets: dict[str, bytes]
    provenance: dict[str, Any]
    load: Callable[[], tuple[Tree, Tree, Tree | None]]  # what is trained, what is frozen, and the slow copy, as the run begins
    load_frozen: Callable[[], Tree]  # of the base alone, where a checkpoint holds the rest


class Base(NamedTuple):
    """The MODEL begun from. A run may go on while another is trained on it, so of a run it is one checkpoint."""

    path: str
    fingerprint: str


def check_run(run: Run) -> None:
    """What can be told of a run before anything of it is opened."""
    if not run.base or not run.out:
        missing, what = ("out", "where the run shall lie") if run.base else ("base", "from which MODEL to begin")
        raise RequestError(f"{missing} is missing: say {what}")


def open_run(run: Run, mesh: Mesh) -> Opened:
    base = Base(*by_one(lambda: list(_find_base(run))))
    if run.stage_one is not None:
        return _open_stage_one(run, run.stage_one, mesh, base)
    assert run.stage_two is not None
    return _open_stage_two(run, run.stage_two, mesh, base)


# --- Stage I -----------------------------------------------------------------------------------------------------------------


def _open_stage_one(run: Run, stage_one: StageOneConfig, mesh: Mesh, base: Base) -> Opened:
    backbone = read_config(base.path)
    engine = partial(open_engine, base.path)

    def rows(shares: Mapping[str, str], changes: AugmentConfig) -> PackedRows:
        return open_packed(
            {path: _share(text) for path, text in shares.items()},
            engine,
            length=stage_one.length,
            batch=run.batch,
            seed=run.seed,
            row_length=stage_one.row_length,
            changes=changes,
            plans=f"{run.out}/plans",
            show=jax.process_index() == 0,
        )

    packed = rows(stage_one.corpora, _changes(stage_one.changes))
    found = outline(run, mesh, backbone, kinds={"corpus": tuple(stage_one.corpora)})
    held_out = rows(stage_one.held_out, AugmentConfig()) if stage_one.held_out else None
    lora = None if stage_one.lora is None else asdict(stage_one.lora)
    provenance = _provenance(base, found) | {"stage": 1, "lora": lora}

    def load(wanted: Tree) -> Tree:
        own = {path: leaf for path, leaf in leaves(wanted) if ADAPTER not in path}
        return load_params(base.path, nested(own)) if own else {}

    def load_all() -> tuple[Tree, Tree, None]:
        trained = load(found.trained)
        if stage_one.lora is not None:
            trained = joined(trained, _new_adapters(backbone, found, stage_one.lora))
        return trained, load(found.frozen), None

    identity = {"base": base.fingerprint, "seed": run.seed, "batch": run.batch, "length": stage_one.length, "row_length": packed.row_length}
    identity |= {"mixture": packed.sequences.mixture.identity, "changes": asdict(stage_one.changes)}
    return Opened(found, packed, held_out, identity, _assets(base.path), provenance, load_all, lambda: load(found.frozen))


def _new_adapters(backbone: BackboneConfig, found: Outline, lora: LoraConfig) -> Tree:
    def make() -> Tree:
        model = adapted(Mllm(backbone, found.run.hardware.compute, rngs=nnx.Rngs(0)), lora, found.run.seed)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return nested({path: leaf for path, leaf in leaves(params) if ADAPTER in path})

    shapes = nested({path: leaf for path, leaf in leaves(found.trained) if ADAPTER in path})
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()


# --- Stage II ----------------------------------------------------------------------------------------------------------------


def _open_stage_two(run: Run, stage_two: StageTwoConfig, mesh: Mesh, base: Base) -> Opened:
    backbone = read_config(base.path)
    before = read_policy(base.path) if has_policy(base.path) else None
    policy = _policy_of(run, stage_two, before)
    check_backbone(policy, backbone)
    known = load_robots(stage_two.robots_files)
    robots = {name: (before.robots if before and name in before.robots else known).get(name) for name in policy.robots}
    for name in policy.robots:
        robots[name] = find_robot(name, known) if robots[name] is None else robots[name]
    surveys: dict[str, Survey] = {}
    for one in stage_two.sets:
        robot = find_robot(one.robot, {name: found for name, found in robots.items() if found is not None})
        surveys[f"{one.robot} {one.stats}"] = read_survey(one.stats, robot)
    statistics = _statistics(stage_two, surveys, before)
    files = PolicyFiles(policy, {name: robot for name, robot in robots.items() if robot is not None}, statistics, base.fingerprint)
    cached = bool(stage_two.intents)

    def rows(sets: Sequence[SetConfig], changes: ChangesConfig) -> MomentRows:
        return open_moments(
            [_demonstrations(one, files.robots, surveys[f"{one.robot} {one.stats}"], cached, stage_two.every) for one in sets],
            statistics,
            policy,
            partial(open_engine, base.path),
            batch=run.batch,
            seed=run.seed,
            shares=[_share(one.share) for one in sets],
            augmentation=Augmentation(_changes(changes), changes.seed, changes.versions or int(cached)),
            room=stage_two.instruction_tokens,
            intents=[open_intents(path) for path in stage_two.intents],
            backbone=files.backbone,
            dtype=run.hardware.compute.dtype,
        )

    learned = [one for one in stage_two.sets if not one.held_out]
    held = [one for one in stage_two.sets if one.held_out]
    moments = rows(learned, stage_two.changes)
    labels = [one.task or one.path for one in learned]
    tasks = tuple(dict.fromkeys(labels))
    moments.tasks = tuple(tasks.index(label) for label in labels)
    kinds = {"action/task": tasks, "action/robot": policy.robots, "future/robot": policy.robots}
    found = outline(run, mesh, None if cached else backbone, policy, kinds)
    provenance = _provenance(base, found) | {"stage": 2, "intents": list(stage_two.intents)}

    def load_backbone() -> Tree:
        shapes = found.frozen.get("backbone")
        return {} if shapes is None else {"backbone": load_params(base.path, shapes)}

    def load_policy() -> Tree:
        if before is None or stage_two.policy is not None:
            return random_policy(policy, jnp.float32, mesh, seed=run.seed)
        params = load_policy_params(base.path, abstract_policy(before.config, jnp.float32, mesh))
        config = before.config
        for name in policy.robots[len(config.robots) :]:
            params = add_robot(params, config, seed=run.seed)
            config = replace(config, robots=(*config.robots, name))
        return params

    def load_all() -> tuple[Tree, Tree, Tree]:
        params = load_policy()
        trained, frozen = split({"policy": params}, found.rate_of)
        return trained, {**frozen, **load_backbone()}, params["bridge"]

    identity = {
        "base": base.fingerprint,
        "seed": run.seed,
        "batch": run.batch,
        "mixture": moments.order.mixture.identity,
        "changes": asdict(stage_two.changes),
        **({"every": stage_two.every} if stage_two.every > 1 else {}),  # runs of all steps were begun before there were others
    }
    assets = _assets(base.path) | {"policy.json": json.dumps(contract(files), indent=2, allow_nan=False).encode() + b"\n"}
    # Intents are of pictures as they were changed; pictures that are looked at need not be.
    held_out = rows(held, stage_two.changes if cached else ChangesConfig()) if held else None
    return Opened(found, moments, held_out, identity, assets, provenance, load_all, load_backbone)


def _policy_of(run: Run, stage_two: StageTwoConfig, before: PolicyFiles | None) -> PolicyConfig:
    """A new one as the run says, or the base's own; robots that are trained for the first time get rows at its end."""
    config = stage_two.policy
    if config is None:
        if before is None:
            raise RequestError(f"stage_two.policy is missing, and {run.base} has no policy/ to go on with: say what to train")
        config = before.config
        new = dict.fromkeys(one.robot for one in stage_two.sets if one.robot not in config.robots)
        config = replace(config, robots=(*config.robots, *new))
    return config


def _demonstrations(one: SetConfig, robots: Mapping[str, Robot], survey: Survey, cached: bool, every: int) -> Demonstrations:
    robot = find_robot(one.robot, robots)
    return open_demonstrations(one.path, robot, survey, () if cached else [camera.name for camera in robot.cameras], every)


def _statistics(stage_two: StageTwoConfig, surveys: Mapping[str, Survey], before: PolicyFiles | None) -> dict[str, Statistics]:
    """By robot. Those a policy was trained with stay what they are: other numbers would mean other actions."""
    kept = dict(before.statistics) if before is not None and stage_two.policy is None else {}
    for one in stage_two.sets:
        found = surveys[f"{one.robot} {one.stats}"].statistics
        if one.robot in kept and kept[one.robot] != found:
            raise RequestError(
                f"{one.stats}: the base's policy, or another set, has other statistics of {one.robot}: make one file of all its sets, "
                "or begin a new policy with stage_two.policy"
            )
        kept[one.robot] = found
    return kept


# --- both --------------------------------------------------------------------------------------------------------------------


def _share(text: str) -> float | str:
    """A weight is a number, a percentage is not."""
    try:
        return float(text)
    except ValueError:
        return text


def _changes(changes: ChangesConfig) -> AugmentConfig:
    return AugmentConfig(crop=changes.crop, brightness=changes.brightness, contrast=changes.contrast, saturation=changes.saturation)


def _assets(base: str) -> dict[str, bytes]:
    directory = assets_dir(base)
    return {name: (directory / name).read_bytes() for name in asset_names(directory)}


def _provenance(base: Base, found: Outline) -> dict[str, Any]:
    return {
        "base": describe_base(base.path, base.fingerprint),
        "trained": sorted(".".join(path) for path, _ in leaves(found.trained)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def by_one(work: Callable[[], Any]) -> Any:
    """What process 0 finds, as JSON, to all; and where it fails, all of them fail with what it says."""
    told: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            told = {"found": work()}
        except (RequestError, OSError) as error:
            told = {"error": one_line(error)}
    if jax.process_count() > 1:
        text = json.dumps(told).encode().ljust(MESSAGE)
        told = json.loads(bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))))
    if "error" in told:
        raise RequestError(told["error"])
    return told["found"]


def _find_base(run: Run) -> Base:
    """All of it is read for its fingerprint, but only once, as long as its files are the same."""
    note = open_path(run.out) / BASE
    known = read_json(note) if note.exists() else {}
    path = known["path"] if known.get("asked") == run.base else os.fspath(newest_of_run(open_path(run.base)))
    now = stamp(open_path(path))
    if known.get("stamp") == now:
        return Base(path, known["fingerprint"])
    found = fingerprint(path, show=True)
    if known and found != known["fingerprint"]:
        raise RequestError(
            f"{path} is not the base that {run.out} began from: its fingerprint is {found[:23]}..., "
            f"that was {known['fingerprint'][:23]}...; put it back, or choose another out"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    known = {"asked": run.base, "path": path, "stamp": now, "fingerprint": found}
    write_whole(note, json.dumps(known, indent=2).encode() + b"\n")
    return Base(path, found)
