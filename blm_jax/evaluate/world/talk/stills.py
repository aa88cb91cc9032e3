"""Scenes to ask questions about: more of them, and more kinds, than tasks begin with.

Three sorts. Loose things lie on the table, with or without an arm. Or a hand is at a step of bringing a thing to a target: away from it,
around it, closed on it, carrying it, or holding it on the target. Or a task's episode has been brought to its end, or nearly. Arms stand as
their inverse kinematics has them, and what a picture hides is sorted out by the picture: a scene is kept if all its things can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.evaluate.world import arms, render, tasks, view
from blm_jax.evaluate.world.contact import BALL_IN_BIN
from blm_jax.evaluate.world.ik import reach
from blm_jax.evaluate.world.scene import BALL, BODIES, BOX, NOTHING, Setting, Shapes, State

LOOSE = 4  # things beside a task's bodies
DRUM = 3  # a kind that only those are of
NOUNS = ("cube", "ball", "cylinder", "peg")
GOAL = "goal"  # what a mark is called, in the air or on the table
FORK = "fork"  # what a chain of bars ends in, where there are no robots
BARS = 5
STEPS = ("approach", "grasp", "lift", "move", "release")
STEP_SHARES = (0.15, 0.4, 0.15, 0.15, 0.15)  # only a hand about to grasp shows what can be grasped

BATCH = 96  # scenes at a time
AREA = ((-0.18, 0.18), (-0.22, 0.22))  # x and y of what hands are brought to
WIDE = ((-0.3, 0.18), (-0.22, 0.22))  # of loose things
MARK_HIGH = (0.03, 0.34)  # of marks in the air
NEAR_MARK = 0.1  # from one, at most, what is carried to it, or lies by it
MARKED = 0.3  # of loose things' marks are by one of them
APART = 0.075  # metres between middles
SEEN = 12  # pixels of what is seen: of each thing in the first picture
FREE = 4  # pixels from the picture's edge, at least
TIPS = 0.01  # that a hand reaches below the middle of what it holds
HELD_HIGH = (0.09, 0.2)
BESIDE = 0.07  # from a thing's middle, where a hand is no longer around it
ITERATIONS = 16  # of the inverse kinematics
REACHED = (0.004, 0.12)  # metres and radians that a pose may be off


@dataclass(frozen=True)
class Thing:
    noun: str
    colour: str
    position: np.ndarray  # [3]
    place: np.ndarray  # [2] column and row of its middle in the first picture
    turn: float | None = None  # radians about the vertical, of what has square sides


@dataclass(frozen=True)
class Still:
    """A scene and what is known of it. Numbers of things count in `things`."""

    pictures: np.ndarray  # [cameras, size, size, 3]
    things: tuple[Thing, ...]
    sizes: np.ndarray  # [cameras, things + 1] pixels of each thing, and of the mark
    goal: np.ndarray | None  # [3] a mark, where it can be seen
    tip: np.ndarray | None  # [3] between the tips of a hand or fork
    robot: str | None
    base: np.ndarray  # [3]
    around: int | None  # what the open hand or the fork is around
    held: int | None
    wanted: int | None  # what is to be brought to the target
    step: str | None  # what the hand is to do next for that
    task: str | None  # of tasks.TASKS, if this is an episode of one
    instruction: str | None
    succeeded: bool | None


class Extras(NamedTuple):
    """What a scene has beside an episode's, and where its hand is to be."""

    kind: Any  # [LOOSE]
    half: Any  # [LOOSE, 3]
    position: Any  # [LOOSE, 3]
    rotation: Any  # [LOOSE, 3, 3]
    colour: Any  # [LOOSE, 3]
    has_arm: Any  # []
    has_pose: Any  # []
    pose: Any  # [4, 4] of the tool
    bars: Any  # [BARS + 1, 3] from end to end, one hanging on the other
    girth: Any  # [BARS]
    bar_colour: Any  # [3]
    fork: Any  # [4, 4] pose between its tips
    fork_half: Any  # [2, 3] of what its prongs are fixed to, and of each prong
    fork_open: Any  # [] metres between them
    fork_colour: Any  # [3]


def stills(seed: int, split: str, robots: bool = True) -> Iterator[Still]:
    """Without end; those of another split are others. Without robots, things alone lie on the table."""
    random = np.random.default_rng([seed, *split.encode()])
    while True:
        yield from _batch(random, robots)


def _batch(random: np.random.Generator, may_have_arms: bool) -> Iterator[Still]:
    robots, wanted = random.integers(0, len(arms.ROBOTS), BATCH), random.integers(0, len(tasks.TASKS), BATCH)
    begun = _beginnings(int(random.integers(2**31)), robots, wanted)
    drafts = [_Draft(random, *_one(begun, i), robot=int(robots[i]) if may_have_arms else None) for i in range(BATCH)]
    columns = zip(*(draft.arrays() for draft in drafts), strict=True)
    setting, state, extras = (jax.tree.map(lambda *leaves: np.stack(leaves), *column) for column in columns)
    pictures, sizes, left, tools, done = (np.asarray(array) for array in _drawn(may_have_arms)(setting, state, extras))
    for i, draft in enumerate(drafts):
        still = draft.still(pictures[i], sizes[i], tools[i], bool(done[i]))
        if (left[i] < REACHED).all() and still is not None:
            yield still


def _one(batch: tuple[Setting, State], i: int) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: np.array(leaf[i]), batch)


def _beginnings(seed: int, robots: np.ndarray, wanted: np.ndarray) -> tuple[Setting, State]:
    return jax.tree.map(np.asarray, _reset()(jax.random.split(jax.random.key(seed), len(robots)), robots, wanted))


@cache
def _reset() -> Callable:
    return jax.jit(jax.vmap(tasks.reset))


@cache
def _drawn(may_have_arms: bool) -> Callable:
    return jax.jit(partial(drawn, may_have_arms=may_have_arms))


def drawn(setting: Setting, state: State, extras: Extras, may_have_arms: bool = True) -> tuple[jax.Array, ...]:
    """Of a batch: pictures, the pixels of each thing and of the mark in each, what hands lack to their poses, where hands are, and whether
    tasks have succeeded.
    """

    def arranged(setting: Setting, state: State, extras: Extras) -> tuple[Shapes, jax.Array, jax.Array, jax.Array]:
        if not may_have_arms:
            return _shapes(setting, state, extras, may_have_arms), jnp.zeros(2), jnp.zeros(3), jnp.array(False)
        joints, left = reach(setting.arm, setting.base, extras.pose, setting.arm.ready, setting.arm.ready, ITERATIONS)
        state = state._replace(joints=jnp.where(extras.has_pose, joints, state.joints))
        left, tool = jnp.where(extras.has_pose, left, 0), arms.forward(setting.arm, setting.base, state.joints)[1][:3, 3]
        return _shapes(setting, state, extras, may_have_arms), left, tool, tasks.succeeded(setting, state)

    cameras = jax.tree.map(lambda *leaves: jnp.stack(leaves), *view.CAMERAS.values())

    def sizes(shapes: Shapes, camera: render.Camera) -> jax.Array:
        seen, _ = render.first_seen(shapes, camera, view.SIZE)
        boxes, others = len(shapes.box_half), len(shapes.ball_radius) + len(shapes.rod_radius)
        signs = boxes + others + len(shapes.drum_radius)
        places = [(i, boxes + i) for i in range(BODIES)]
        places += [(BODIES + i, boxes + BODIES + i, boxes + others + i) for i in range(LOOSE)]
        places.append((boxes + others + LOOSE, boxes + others + LOOSE + 1, signs))
        return jnp.stack([sum((jnp.sum(seen == number) for number in place), jnp.int32(0)) for place in places])

    shapes, left, tools, done = jax.vmap(arranged)(setting, state, extras)
    shown = jax.lax.map(lambda camera: jax.lax.map(lambda one: sizes(one, camera), shapes, batch_size=render.CHUNK), cameras)
    return view.pictures(shapes), jnp.swapaxes(shown, 0, 1), left, tools, done


def _shapes(setting: Setting, state: State, extras: Extras, may_have_arms: bool) -> Shapes:
    """Bodies and loose things come first of their kinds, and then the mark."""
    bodies = view.body_shapes(setting.kind, setting.half, state.position, state.rotation, setting.colour)
    loose = view.body_shapes(extras.kind, extras.half, extras.position, extras.rotation, extras.colour)
    is_drum = extras.kind == DRUM
    drums = loose._replace(
        drum_centre=extras.position,
        drum_radius=jnp.where(is_drum, extras.half[:, 0], 0),
        drum_half=extras.half[:, 2],
        drum_colour=extras.colour,
    )
    marks = view.place_shapes(setting)
    if not may_have_arms:
        bars = view.bar_shapes(extras.bars, extras.girth, extras.bar_colour)
        fork = view.hand_shapes(extras.fork, extras.fork_half, extras.fork_open, extras.fork_colour, extras.fork_colour)
        return view.joined(bodies, drums, marks, bars, fork)
    arm = view.arm_shapes(setting.arm, setting.base, state.joints, state.opening)
    arm = arm._replace(
        box_half=arm.box_half * extras.has_arm, rod_radius=arm.rod_radius * extras.has_arm, drum_radius=arm.drum_radius * extras.has_arm
    )
    return view.joined(bodies, drums, marks, arm)


# --- what is drawn -------------------------------------------------------------------------------------------------------


class _Draft:
    """A scene that is being laid out, begun as an episode of a task."""

    def __init__(self, random: np.random.Generator, setting: Any, state: Any, robot: int | None):
        self.random, self.setting, self.state, self.robot = random, setting, state, robot
        self.extras = Extras(
            kind=np.full(LOOSE, NOTHING, np.int32),
            half=np.zeros((LOOSE, 3), np.float32),
            position=np.zeros((LOOSE, 3), np.float32),
            rotation=np.tile(np.eye(3, dtype=np.float32), (LOOSE, 1, 1)),
            colour=np.zeros((LOOSE, 3), np.float32),
            has_arm=np.array(True),
            has_pose=np.array(False),
            pose=np.eye(4, dtype=np.float32),
            bars=np.zeros((BARS + 1, 3), np.float32),
            girth=np.zeros(BARS, np.float32),
            bar_colour=np.zeros(3, np.float32),
            fork=np.eye(4, dtype=np.float32),
            fork_half=np.zeros((2, 3), np.float32),
            fork_open=np.float32(0),
            fork_colour=np.zeros(3, np.float32),
        )
        self.around: int | None = None
        self.step: str | None = None
        self.is_task = False
        self.taken: list[np.ndarray] = []  # places that nothing else may come near
        # A few colours a scene: things of the same colour are worth counting.
        self.palette = random.choice(len(tasks.COLOURS), int(random.integers(1, 6)), replace=False)
        sort = random.random()
        if robot is None or sort < 0.36:
            self._loose_things(most=BODIES + LOOSE)
        elif sort < 0.78:
            self._a_step(str(random.choice(STEPS, p=STEP_SHARES)))
        else:
            self._an_end(bool(random.random() < 0.6))

    def arrays(self) -> tuple[Setting, State, Extras]:
        return self.setting, self.state, self.extras

    def still(self, pictures: np.ndarray, sizes: np.ndarray, tool: np.ndarray, done: bool) -> Still | None:
        kinds = np.concatenate([self.setting.kind, self.extras.kind])
        there = np.flatnonzero(kinds != NOTHING)
        half, colour = (np.concatenate(pair) for pair in ((self.setting.half, self.extras.half), (self.setting.colour, self.extras.colour)))
        position = np.concatenate([self.state.position, self.extras.position])
        places, _ = render.project(view.CAMERAS["front"], position, view.SIZE)
        if (sizes[0, there] < SEEN).any() or (np.abs(places[there] - view.SIZE / 2) > view.SIZE / 2 - FREE).any():
            return None
        names = {BALL: "ball", DRUM: "cylinder", BOX: "cube"}
        nouns = ["peg" if half[i, 0] > 2 * half[i, 1] else names[int(kinds[i])] for i in there]
        rotation = np.concatenate([self.state.rotation, self.extras.rotation])
        turns = [float(np.arctan2(rotation[i, 1, 0], rotation[i, 0, 0])) if names[int(kinds[i])] == "cube" else None for i in there]
        colours = [tasks.COLOURS[int(np.abs(tasks.PALETTE - colour[i]).sum(-1).argmin())] for i in there]
        order = {int(number): i for i, number in enumerate(there)}
        held = int(self.state.held)
        has_arm = bool(self.extras.has_arm)
        return Still(
            pictures=pictures,
            things=tuple(
                Thing(noun, colour, position[i], places[i], turn if noun == "cube" else None)
                for noun, colour, i, turn in zip(nouns, colours, there, turns, strict=True)
            ),
            sizes=sizes[:, [*there, -1]],
            goal=self.setting.goal if self.setting.goal_seen and sizes[0, -1] >= SEEN else None,
            tip=self._tip(tool),
            robot=arms.ROBOTS[self.robot] if has_arm and self.robot is not None else None,
            base=self.setting.base,
            around=None if self.around is None else order[self.around],
            held=None if held < 0 else order[held],
            wanted=None if self.step is None else 0,
            step=self.step,
            task=tasks.TASKS[int(self.setting.task)] if self.is_task else None,
            instruction=self._instruction() if self.is_task else None,
            succeeded=done if self.is_task else None,
        )

    def _tip(self, tool: np.ndarray) -> np.ndarray | None:
        """Where it is, if there is one, both cameras see the place, and an arm does not stand where all begin."""
        has_fork = self.extras.fork_half.any()
        tip = self.extras.fork[:3, 3] if has_fork else tool if self.robot is not None and self.extras.has_pose else None
        if tip is None:
            return None
        found = np.stack([render.project(camera, tip, view.SIZE)[0] for camera in view.CAMERAS.values()])
        return tip if (np.abs(found - view.SIZE / 2) < view.SIZE / 2 - FREE).all() else None

    def _instruction(self) -> str:
        task, wanted, other = (int(number) for number in tasks.asked(self.setting))
        return tasks.instruction(task, wanted, other, int(self.random.integers(3)))

    # Sorts of scenes

    def _loose_things(self, most: int) -> None:
        """And nothing of a task's."""
        self.setting = self.setting._replace(
            kind=np.full(BODIES, NOTHING, np.int32), goal_seen=np.array(False), has_bin=np.array(False), base=self._base()
        )
        if self.random.random() < 0.5:
            height = self.random.uniform(*MARK_HIGH) if self.random.random() < 0.7 else 0
            goal = np.array([*self._somewhere(WIDE), height], np.float32)
            self.setting = self.setting._replace(goal=goal, goal_seen=np.array(True))
        self.extras = self.extras._replace(has_arm=np.array(self.robot is not None and self.random.random() < 0.4))
        self.state = self.state._replace(joints=self._joints(0.1))
        count = int(self.random.integers(1, most + 1))
        for number in range(BODIES + LOOSE - count, BODIES + LOOSE):  # the last ones may be cylinders
            self._put(number)
        there = np.flatnonzero(self.extras.kind != NOTHING)
        if self.robot is None and self.setting.goal_seen and there.size and self.random.random() < MARKED:
            off = self._direction() * self.random.uniform(0, NEAR_MARK) * [1, 1, self.setting.goal[2] > 0]
            near = self.extras.position[self.random.choice(there)] + off
            self.setting.goal[:] = near[0], near[1], max(near[2], MARK_HIGH[0]) * (self.setting.goal[2] > 0)
        if self.robot is None and self.random.random() < 0.8:
            self._hang_bars()

    def _a_step(self, step: str) -> None:
        """The first body is to be brought to a target, and this is what comes next."""
        self.step = step
        self.setting = self.setting._replace(kind=np.array([BOX, NOTHING], np.int32), has_bin=np.array(False), base=self._base())
        place = self._somewhere()
        target = self._away_from(place, 0.16)
        if step == "release":
            place = target + self._disc(0.5 * tasks.REACHED)
        self.setting = self.setting._replace(goal=np.array([*target, 0], np.float32), goal_seen=np.array(True))
        self.taken += [place]
        yaw = self._azimuth(place) + self.random.uniform(-0.4, 0.4)
        kind = BOX if self.random.random() < 0.6 else BALL
        self._set(0, kind, np.full(3, self.random.uniform(0.018, 0.023)), place, yaw)
        self._grip(step, place, yaw)
        for number in range(BODIES, BODIES + int(self.random.integers(0, LOOSE))):
            self._put(number)

    def _grip(self, step: str, place: np.ndarray, yaw: float) -> None:
        half = float(self.setting.half[0, 2])
        height = half + (self.random.uniform(*HELD_HIGH) if step == "move" else 0)
        at = np.array([*place, height])
        opening = 1.0
        if step == "approach":
            off = self.random.uniform(BESIDE, 2 * BESIDE)
            turn, rise = self.random.uniform(0, 2 * np.pi), self.random.uniform(0, np.pi / 2)
            at = at + off * np.array([np.cos(turn) * np.cos(rise), np.sin(turn) * np.cos(rise), np.sin(rise)])
            self.taken.append(at[:2])
        elif step == "grasp":
            self.around = 0
        else:
            opening = 2 * half / float(self.setting.arm.stroke)
            self.state = self.state._replace(held=np.int32(0))
            self.state.position[0, 2] = height
        self.state = self.state._replace(opening=np.float32(opening))
        self._pose(at, yaw)

    def _an_end(self, good: bool) -> None:
        """A task's episode as it began, brought to a good end, or to one that only looks like it."""
        self.is_task = True
        setting, state, random = self.setting, self.state, self.random
        task, up = int(setting.task), np.array([0, 0, 1])
        near = random.random() < 0.6  # misses, if it is not good
        if task == tasks.PICK and (good or near):
            off = self._direction() * random.uniform(0.05, 0.1) * (not good)
            at = setting.goal + off
            at[2] = max(at[2], setting.half[0, 2])
            yaw = self._azimuth(at[:2])
            state.position[0], state.rotation[0] = at, _turned(yaw)
            opening = np.float32(2 * setting.half[0, 2] / setting.arm.stroke)
            self.state = state._replace(held=np.int32(0), opening=opening)
            self._pose(at, yaw)
        elif task in (tasks.PUSH, tasks.PULL) and (good or near):
            state.position[0, :2] = setting.goal[:2] + (self._disc(0.06) if good else self._ring(0.13, 0.16))
        elif task == tasks.STACK and (good or near):
            off = np.zeros(2) if good else self._ring(0.045, 0.06)
            height = setting.half[1, 2] * 2 + setting.half[0, 2] if good else setting.half[0, 2]
            state.position[0], state.rotation[0] = [*(state.position[1, :2] + off), height], state.rotation[1]
        elif task == tasks.PLACE and (good or near):
            missed = [*(setting.bin[:2] + self._ring(0.05, 0.07)), setting.half[0, 2]]
            state.position[0] = setting.bin + up * BALL_IN_BIN if good else missed
        elif task == tasks.LIFT and good:
            state.position[0, 2] = setting.half[0, 0]
            state.rotation[0] = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])

    # Where things are

    def _hang_bars(self) -> None:
        """A chain from behind the table to a fork above it, about a thing or with one in it, of no colour that things have."""
        random = self.random
        tip, apart = np.array([*self._somewhere(WIDE), random.uniform(0.01, 0.35)]), random.uniform(0.02, 0.1)
        if (there := np.flatnonzero(self.extras.kind != NOTHING)).size and random.random() < 0.7:
            number, is_above = int(random.choice(there)), random.random() < 0.4
            apart = random.uniform(0.06, 0.1)
            if not is_above and random.random() < 0.4:  # carried, as often as not to a mark
                self.extras.position[number, 2] += random.uniform(0, MARK_HIGH[1] - 0.06)
                if self.setting.goal_seen and self.setting.goal[2] > 0 and random.random() < 0.5:
                    at = self.setting.goal + self._direction() * random.uniform(0, NEAR_MARK)
                    self.extras.position[number] = np.maximum(at, [-np.inf, -np.inf, self.extras.half[number, 2]])
                apart = 2 * self.extras.half[number, 1]
            low = self.extras.position[number, 2] - self.extras.half[number, 2]
            tip = self.extras.position[number] * (1, 1, 0) + [0, 0, low + random.uniform(0.005, 0.02) + BESIDE * is_above]
            self.around = None if is_above else BODIES + number
        fork, half = np.eye(4), np.array([random.uniform(0.02, 0.05, 3), random.uniform((0.006, 0.004, 0.012), (0.012, 0.008, 0.03))])
        c, s = np.cos(turn := random.uniform(0, 2 * np.pi)), np.sin(turn)
        down = np.array([[c, s, 0], [s, -c, 0], [0, 0, -1]])
        leaning = np.linalg.qr(down + np.outer([0, 0, 1], random.normal(0, 0.15, 3)))[0]
        fork[:3, :3] = leaning * np.sign(np.sum(leaning * down, axis=0))
        fork[:3, 3] = tip
        wrist = tip - fork[:3, 2] * (2 * half[1, 2] + 2 * half[0, 2])
        foot = np.array([random.uniform(-0.65, -0.3), random.uniform(-0.15, 0.15), 0.0])
        share = np.linspace(0, 1, BARS + 1)[:, None]
        bend = np.array([0, 0, random.uniform(0.2, 0.6)]) * np.sin(np.pi * share)
        bars = foot + share * (wrist - foot) + bend + random.normal(0, 0.04, (BARS + 1, 3)) * np.sin(np.pi * share)
        bars[:, 2] = np.maximum(bars[:, 2], 0.04 * (share[:, 0] < 1))
        self.extras = self.extras._replace(
            bars=bars.astype(np.float32),
            girth=np.sort(random.uniform(0.02, 0.06, BARS))[::-1].astype(np.float32),
            bar_colour=self._grey(0.1, 0.95),
            fork=fork.astype(np.float32),
            fork_half=half.astype(np.float32),
            fork_open=np.float32(apart),
            fork_colour=self._grey(0.05, 0.35),
        )

    def _grey(self, low: float, high: float) -> np.ndarray:
        return np.clip(self.random.uniform(low, high) + self.random.uniform(-0.12, 0.12, 3), 0, 1).astype(np.float32)

    def _put(self, number: int) -> None:
        """One more thing, if there is room."""
        random = self.random
        size = random.uniform(0.016, 0.03)
        noun = random.choice(NOUNS, p=(0.32, 0.25, 0.25, 0.18)) if number >= BODIES else "cube"
        half = np.full(3, size)
        if noun == "cylinder":
            half[2] = random.uniform(0.015, 0.04)
        elif noun == "peg":
            half[:] = random.uniform(0.05, 0.08), 0.014, 0.014
        room = APART + half[0] * (noun == "peg")
        for _ in range(40):
            place = self._somewhere(WIDE)
            if all(np.linalg.norm(place - other) > room for other in self.taken):
                break
        else:
            return
        self.taken.append(place)
        kind = {"ball": BALL, "cylinder": DRUM}.get(noun, BOX)
        self._set(number, kind, half, place, random.uniform(0, 2 * np.pi))

    def _set(self, number: int, kind: int, half: np.ndarray, place: np.ndarray, yaw: float) -> None:
        arrays = (self.setting.kind, self.setting.half, self.setting.colour, self.state.position, self.state.rotation)
        if number >= BODIES:
            extras, number = self.extras, number - BODIES
            arrays = (extras.kind, extras.half, extras.colour, extras.position, extras.rotation)
        colour = tasks.PALETTE[self.random.choice(self.palette)]
        for array, value in zip(arrays, (kind, half, colour, [*place, half[2]], _turned(yaw)), strict=True):
            array[number] = value

    def _pose(self, at: np.ndarray, yaw: float) -> None:
        """The hand, looking down, its pads on either side of a place."""
        c, s = np.cos(yaw), np.sin(yaw)
        pose = np.array([[c, s, 0, at[0]], [s, -c, 0, at[1]], [0, 0, -1, max(at[2] - TIPS, 0.005)], [0, 0, 0, 1]], np.float32)
        self.extras = self.extras._replace(has_pose=np.array(True), pose=pose)

    def _base(self) -> np.ndarray:
        """Where the arm stands."""
        return np.array([tasks.BASE_X[self.robot or 0], 0, 0], np.float32)

    def _joints(self, noise: float) -> np.ndarray:
        arm = self.setting.arm
        real = (arm.axes != 0).any(-1)
        return np.clip(arm.ready + real * noise * self.random.normal(size=arm.ready.shape), arm.lower, arm.upper).astype(np.float32)

    def _azimuth(self, place: np.ndarray) -> float:
        return float(np.arctan2(place[1] - self.setting.base[1], place[0] - self.setting.base[0]))

    def _somewhere(self, area: tuple[tuple[float, float], ...] = AREA) -> np.ndarray:
        return np.array([self.random.uniform(*side) for side in area])

    def _away_from(self, place: np.ndarray, distance: float) -> np.ndarray:
        return max((self._somewhere() for _ in range(8)), key=lambda other: min(np.linalg.norm(other - place), distance))

    def _disc(self, radius: float) -> np.ndarray:
        return self._ring(0, radius)

    def _ring(self, inner: float, outer: float) -> np.ndarray:
        turn = self.random.uniform(0, 2 * np.pi)
        return self.random.uniform(inner, outer) * np.array([np.cos(turn), np.sin(turn)])

    def _direction(self) -> np.ndarray:
        vector = self.random.normal(size=3)
        return vector / np.linalg.norm(vector)


def _turned(yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
