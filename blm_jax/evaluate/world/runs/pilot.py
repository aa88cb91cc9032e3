"""A policy at the controls, inside the compiled program: pictures to patches, states and chunks in its units and out of them again.

Chunks are smoothed, and what is left of the last one fades into the next (as in Zhao et al. 2023): an arm is not still where each chunk,
or each step of one, says a little else than the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.batch import Prompts, RobotRows
from blm_jax.config import BackboneConfig, PolicyConfig
from blm_jax.data.collate import lay_out_pictures
from blm_jax.data.demos.moments import Prompter, blank
from blm_jax.data.demos.observation import encode
from blm_jax.data.demos.robots import Robot, action_mask, limits, load_robots, pad, state_mask
from blm_jax.data.demos.statistics import Statistics, affine
from blm_jax.errors import RequestError
from blm_jax.evaluate.world import view
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.runs.cells import PREFIX
from blm_jax.evaluate.world.scene import JOINTS, Setting, State
from blm_jax.infer.act import Actor, noise_of_rows
from blm_jax.models.objective import sample

SMOOTH = np.array([1, 2, 3, 2, 1], np.float32) / 9  # of joints, over steps of a chunk
TURNS = 4096  # at most of an episode, for the numbers of observations


class Units(NamedTuple):
    """Between the world's numbers, JOINTS of them and an opening, and a policy's."""

    state_from: np.ndarray  # [state width] places of the policy's numbers among the world's
    state_center: np.ndarray
    state_slope: np.ndarray  # 0 where there is no spread
    action_center: np.ndarray  # [action width]
    action_scale: np.ndarray
    relative: np.ndarray  # [action width] 1 where an action is relative to the state
    action_from: np.ndarray  # [action width] places in the world of what it moves
    low: np.ndarray  # [action width]
    high: np.ndarray
    action_to: np.ndarray  # [JOINTS + 1] the policy's number for each of the world's, or -1


class Rows(NamedTuple):
    """What a policy knows of an episode from its beginning."""

    prompts: Prompts  # without pictures
    robots: RobotRows  # without states
    units: Units
    number: np.ndarray  # [rows] of the episode, which decides its noise


class Memory(NamedTuple):
    """What a pilot carries from turn to turn."""

    chunk: jax.Array  # [horizon, JOINTS + 1] that is being executed
    begun: jax.Array  # [] bool: it is one


class Pilot:
    def __init__(self, actor: Actor, *, steps: int | None = None, seed: int = 0, blind: bool = False):
        config, files = actor.policy.config, actor.files
        self.actor, self.seed, self.blind = actor, seed, blind
        self.steps = steps or config.objective.steps
        self.robots = {name: _checked(files.robots, PREFIX + name) for name in ROBOTS if PREFIX + name in files.robots}
        if not self.robots:
            wanted = ", ".join(PREFIX + name for name in ROBOTS)
            raise RequestError(f"the policy drives {', '.join(files.robots)}, and none of the world's robots: {wanted}")
        self.turn = min(robot.executed for robot in self.robots.values())
        self.horizon = min(robot.horizon for robot in self.robots.values())
        self.values = actor.backbone, actor.policy
        self.prompter = Prompter(lambda: actor.engine, config.instruction, list(self.robots.values()))
        self.order = _order(self.prompter, next(iter(self.robots.values())), actor.engine.config)
        self._made: dict[tuple[str, str], tuple[Any, ...]] = {}  # by robot and words

    # --- on the host ---

    def rows(self, robots: Sequence[str], instructions: Sequence[str], numbers: np.ndarray) -> Rows:
        keys = list(zip(robots, instructions, strict=True))
        for robot, text in keys:
            if (robot, text) not in self._made:
                self._made[robot, text] = self._row(self.robot(robot), text)
        parts = zip(*(self._made[key] for key in keys), strict=True)
        prompts, robot_rows, units = (jax.tree.map(lambda *leaves: np.concatenate(leaves), *part) for part in parts)
        unseen = np.zeros((len(keys), 0), np.uint8)  # patches are made where they are seen
        batch = replace(prompts.batch, vision=replace(prompts.batch.vision, groups=len(keys), patches=unseen))
        return Rows(replace(prompts, batch=batch), robot_rows, units, numbers.astype(np.int32))

    def robot(self, name: str) -> Robot:
        if name not in self.robots:
            raise RequestError(f"the policy does not drive {PREFIX}{name}; of the world's robots it knows {', '.join(self.robots)}")
        return self.robots[name]

    def _row(self, robot: Robot, text: str) -> tuple[Prompts, RobotRows, Units]:
        config, statistics = self.actor.policy.config, self.actor.files.statistics[robot.name]
        prompts = self.prompter(blank(robot, text), robot)
        widths = config.embodiment.state_width, config.embodiment.action_width
        robots = RobotRows(
            np.array([config.robots.index(robot.name)], np.int32),
            np.zeros((1, widths[0]), np.float32),
            state_mask(robot, widths[0])[None],
            action_mask(robot, config.horizon, widths[1])[None],
        )
        return prompts, robots, jax.tree.map(lambda x: x[None], units_of(robot, statistics, *widths))

    # --- on the devices ---

    def begin(self, row: Any, setting: Setting, state: State) -> Memory:
        return Memory(jnp.zeros((self.horizon, JOINTS + 1)), jnp.bool_(False))

    def decide(self, values: Any, rows: Rows, settings: Setting, states: State, memory: Memory, turn: jax.Array) -> Memory:
        backbone, policy = values
        config: PolicyConfig = policy.config
        now = jnp.concatenate([states.joints, states.opening[:, None]], axis=1)  # [rows, JOINTS + 1]
        units = rows.units
        state = (jnp.take_along_axis(now, units.state_from, axis=1) - units.state_center) * units.state_slope
        pictures = view.pictures(jax.vmap(view.shapes)(settings, states))
        prompts = self._seeing(rows.prompts, jnp.zeros_like(pictures) if self.blind else pictures)
        intent = backbone.intent(prompts, config.intent_block)
        condition = policy.condition(intent, replace(rows.robots, state=state))
        noise = noise_of_rows(self.seed, jnp.asarray(rows.number) * TURNS + turn, 1, config)
        made = sample(policy, condition, noise, self.steps, None, guided=False)[:, : self.horizon]  # [rows, horizon, action width]
        chunk = jax.vmap(smoothed)(now, jax.vmap(told)(units, now, made))
        chunk = jnp.where(memory.begun[:, None, None], faded(memory.chunk, chunk, self.turn), chunk)
        return Memory(chunk, jnp.ones_like(memory.begun))

    def act(self, values: Any, setting: Setting, state: State, memory: Memory, step: jax.Array) -> tuple[jax.Array, jax.Array, Memory]:
        return memory.chunk[step], memory.chunk[step], memory

    def _seeing(self, prompts: Prompts, pictures: jax.Array) -> Prompts:
        """pictures [rows, cameras, height, width, 3] uint8 -> prompts with their patches where the processor lays them."""
        batch, config = prompts.batch, self.actor.engine.config.vision
        assert batch.vision is not None
        rows, cameras, height, width, _ = pictures.shape
        merge, patch = config.merge, config.patch
        shape = (rows, cameras, height // patch // merge, merge, patch, width // patch // merge, merge, patch, 3)
        # [rows, cameras, cell row, cell column, row and column in the cell, colour, row and column in the patch]
        cells = pictures.reshape(shape).transpose(0, 1, 2, 5, 3, 6, 8, 4, 7)
        cells = jnp.repeat(cells[..., None, :, :], config.temporal_patch, axis=-3)  # a picture is a film that stands still
        cells = cells.reshape(rows, -1, merge**2 * config.patch_values)
        length = batch.vision.windows.shape[1]
        filled = jnp.zeros((rows, length // merge**2, cells.shape[-1]), jnp.uint8).at[:, self.order].set(cells)
        patches = filled.reshape(rows, length, config.patch_values)
        return replace(prompts, batch=replace(batch, vision=replace(batch.vision, patches=patches, groups=rows)))


def _checked(stored: Any, name: str) -> Robot:
    """As the policy was trained with, which must be as the world has it."""
    ours, theirs = load_robots()[name], stored[name]
    differ = [part for part in ("state", "action", "cameras", "control", "hz") if getattr(ours, part) != getattr(theirs, part)]
    if differ:
        raise RequestError(f"the policy's {name} is not the world's: {', '.join(differ)} differ; train it on demonstrations of this world")
    return theirs


def _order(prompter: Prompter, robot: Robot, config: BackboneConfig) -> np.ndarray:
    """Where the visual tokens of a row's pictures lie, camera after camera."""
    example = encode(blank(robot), robot, prompter.engine, prompter.instruction)
    for picture, camera in zip(example.pictures, robot.cameras, strict=True):
        found = picture.grid.rows * config.vision.patch, picture.grid.columns * config.vision.patch
        if found != (camera.height, camera.width):
            raise RequestError(
                f"the model resizes pictures of {camera.width}x{camera.height} to {found[1]}x{found[0]}, which is not done on devices: "
                "its preprocessor_config.json must allow so few pixels"
            )
    layout = lay_out_pictures([[example]], config, 1, prompter.shape.row_length, 1)
    assert layout is not None
    return np.concatenate(layout.cells)


def units_of(robot: Robot, statistics: Statistics, state_width: int, action_width: int) -> Units:
    scheme = statistics.scheme
    state_center, state_scale = affine(statistics.state, scheme)
    action_center, action_scale = affine(statistics.action, scheme)
    low, high = limits(robot.action)
    joints = [dimension.name for dimension in robot.state if dimension.kind == "joint"]
    places = {name: i for i, name in enumerate(joints)} | {
        dimension.name: JOINTS for dimension in robot.state if dimension.kind == "gripper"
    }
    state_from = np.array([places[dimension.name] for dimension in robot.state])
    action_from = np.array([places[dimension.name] for dimension in robot.action])
    relative = np.array([robot.relative and dimension.kind == "joint" for dimension in robot.action], np.float32)
    action_to = np.full(JOINTS + 1, -1)
    action_to[action_from] = np.arange(len(action_from))
    slope = np.divide(1, state_scale, out=np.zeros_like(state_scale), where=state_scale > 0)

    def floats(values: np.ndarray, width: int) -> np.ndarray:
        return pad(np.asarray(values), width).astype(np.float32)

    def whole(values: np.ndarray, width: int) -> np.ndarray:
        return pad(np.asarray(values), width).astype(np.int32)

    return Units(
        whole(state_from, state_width),
        floats(state_center, state_width),
        floats(slope, state_width),
        floats(action_center, action_width),
        floats(action_scale, action_width),
        floats(relative, action_width),
        whole(action_from, action_width),
        floats(low, action_width),
        floats(high, action_width),
        action_to.astype(np.int32),
    )


def told(units: Units, now: jax.Array, chunk: jax.Array) -> jax.Array:
    """Of one episode: what a policy says [steps, action width] as the world's targets [steps, JOINTS + 1]; what it lacks stays."""
    absolute = chunk * units.action_scale + units.action_center + units.relative * now[units.action_from]
    absolute = jnp.clip(absolute, units.low, units.high)
    return jnp.where(units.action_to >= 0, absolute[:, units.action_to], now)


def smoothed(now: jax.Array, chunk: jax.Array) -> jax.Array:
    """Of one episode: joints [steps, JOINTS + 1] as a mean of the steps around; an arm has been where it is. Grippers stay as they are."""
    side = len(SMOOTH) // 2
    around = jnp.concatenate([jnp.broadcast_to(now, (side, *now.shape)), chunk, jnp.broadcast_to(chunk[-1], (side, *now.shape))])
    mean = jnp.tensordot(SMOOTH, jnp.stack([around[i : i + len(chunk)] for i in range(len(SMOOTH))]), axes=1)
    return chunk.at[:, :JOINTS].set(mean[:, :JOINTS])


def faded(last: jax.Array, chunk: jax.Array, turn: int) -> jax.Array:
    """Chunks [rows, horizon, JOINTS + 1] that begin as the last ones would have gone on, `turn` steps after these began."""
    left = chunk.shape[1] - turn
    weight = (jnp.arange(left) + 1) / (left + 1)
    begin = weight[:, None] * chunk[:, :left] + (1 - weight[:, None]) * last[:, turn:]
    return chunk.at[:, :left].set(begin)
