"""One step of the world: 50 ms of an arm, its gripper and what lies on the table, without masses or momentum (quasi-static).

Every step is cut into substeps. In each the joints go towards their targets within their speed limits, and what then touches is looked
at a few times over. The hand is eased off what does not give way: the table, the bin, and a body that it stands on. A body that is touched
from the side slides and turns as a quasi-static limit surface says, and pushes the other body on. If something is too deep in
something nevertheless, the hand and the bodies stay where they were, and the next substep is tried at a slower pace: so nothing is ever
deeper than that. Closing pads that touch a body from both sides turn it until it lies flat between them; from then on it keeps its pose
in the tool, pushes and stops the hand as the pads do, and falls when they open. What is not held falls until something carries it.

What is modelled with care: kinematics, speed limits, where boxes and balls touch in three dimensions, how bodies that lie on the
table slide and turn (an ellipsoid for a footprint that weighs evenly, one coefficient of friction), from which tilt on a peg falls over,
the bin's walls under a ball. What is not:

* masses, momentum and forces: what is let go has no speed, what is pushed stops with the hand, no grip is too weak and nothing slips in it;
* a body moves up only when held: a hand below it, or that presses it down on a slant (steeper than 45 degrees), is stopped;
* a ball that is pushed moves with the push and rolls no further; it does not spin;
* friction of a body against another body, and of what stands on a body that is pushed: that one stays where it is until it is not
  carried any more;
* a box that overhangs slides off the edge, level, instead of tipping over it; what falls does not turn in the air, bounce or roll;
* tipping takes its time but no momentum, about one corner or edge, and stops if the hand or a body is in its way;
* pads grip sideways only (their line within 39 degrees of level), and turn a body about the vertical only;
* of the arm only the pads and the palm touch anything; its links and base do not, and the table has no end.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from blm_jax.evaluate.world.contact import (
    BIN_BLOCK,
    DEPTH,
    FACE,
    NEAR,
    SLACK,
    STEEP,
    Solid,
    Touch,
    best,
    cross,
    dot,
    edge,
    face_gap,
    foremost,
    friction_arm,
    gap_along,
    give_way,
    left_of,
    out_of_bin,
    reach,
    rotate,
    select,
    size,
    times,
    touch,
    turned,
    unrotate,
)
from blm_jax.evaluate.world.falling import fallen
from blm_jax.evaluate.world.scene import BALL, BODIES, DT, HZ, NOTHING, SUBSTEPS, Arm, Setting, State

FRICTION = 0.8  # of pads and bodies
CONE = (1 + FRICTION**2) ** -0.5  # the cosine of its half angle
LOOKS = 3  # at what touches what, in a substep, with corrections after each but the last
SLOWER = 0.25  # the pace of a hand that could not go on, in the next substep
FLAT = 0.02  # radians off, and a body lies flat between the pads
LET_GO = 0.02  # openings more than while it was held let a body go
FAR = 50.0  # metres away is what is not there

PADS, PALM, HELD, OTHER = slice(0, 2), 2, 3, 4  # what touches bodies: the gripper, the body that it holds, and the other body
MOVERS = 4


class Bodies(NamedTuple):
    position: jax.Array  # [3, BODIES, ...]
    rotation: jax.Array  # [3, 3, BODIES, ...]


class Hand(NamedTuple):
    """Where the arm and its gripper are, within a substep."""

    joints: jax.Array  # [JOINTS, ...]
    opening: jax.Array  # [...]
    at: jax.Array  # [3, ...] the tool
    turn: jax.Array  # [3, 3, ...]


@jax.custom_batching.custom_vmap
def step(setting: Setting, state: State, action: jax.Array) -> State:
    """What an action [JOINTS + 1] makes of a state: where the joints shall be, then the gripper's opening from 0 to 1.

    Numbers beyond their limits mean these; what is no number means to stay.
    """
    one = jax.tree.map(lambda x: jnp.asarray(x)[..., None], (setting, state, action))
    return jax.tree.map(lambda x: x[..., 0], _step(*one))


@step.def_vmap
def _step_of_many(episodes: int, batched: tuple, *arguments: Setting | State | jax.Array) -> tuple[State, State]:
    """Episodes go last, where they make long rows."""
    last = [
        jax.tree.map(
            lambda x, has: jnp.moveaxis(x, 0, -1) if has else jnp.broadcast_to(jnp.asarray(x)[..., None], (*jnp.shape(x), episodes)), *pair
        )
        for pair in zip(arguments, batched, strict=True)
    ]
    after = _step(*last)
    return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), after), jax.tree.map(lambda _: True, after)


def _step(setting: Setting, state: State, action: jax.Array) -> State:
    """`step` of many episodes; everything is turned so that vectors go first, then bodies, then episodes."""
    arm = setting.arm
    setting = setting._replace(half=jnp.swapaxes(setting.half, 0, 1))
    start = _body_first(state)
    action = jnp.where(jnp.isnan(action), jnp.concatenate([start.joints, start.opening[None]]), action)
    target = jnp.clip(action[:-1], arm.lower, arm.upper)
    wish = jnp.clip(action[-1], 0, 1)
    at, rotation, _, _ = reached(arm, setting.base, start.joints)
    hand = Hand(start.joints, start.opening, at, rotation)
    pace = jnp.ones_like(wish)
    (end, _, _), _ = jax.lax.scan(
        lambda carry, _: (_substep(setting, target, wish, *carry), None), (start, hand, pace), None, length=SUBSTEPS
    )
    end = end._replace(
        speed=size(end.position - start.position) * HZ,
        moving=jnp.max(jnp.abs(end.joints - start.joints), axis=0) * HZ,
        steps=start.steps + 1,
    )
    return _body_last(end)


def _body_first(state: State) -> State:
    return state._replace(position=jnp.swapaxes(state.position, 0, 1), rotation=jnp.moveaxis(state.rotation, 0, 2))


def _body_last(state: State) -> State:
    return state._replace(position=jnp.swapaxes(state.position, 0, 1), rotation=jnp.moveaxis(state.rotation, 2, 0))


# --- where everything is -------------------------------------------------------------------------------------------------


def reached(arm: Arm, base: jax.Array, joints: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Where the tool is [3, ...] and how it is turned [3, 3, ...], and each joint's place and axis [JOINTS, 3, ...].

    As `arms.forward`, in rows of episodes.
    """

    def next_joint(frame: tuple[jax.Array, jax.Array], joint: tuple[jax.Array, jax.Array, jax.Array]):
        at, turn = frame
        link, axis, angle = joint
        at = at + rotate(turn, link[:3, 3])
        turn = times(turn, link[:3, :3])
        c, s = jnp.cos(angle), jnp.sin(angle)
        around = rotate(turn, axis)  # in the world
        # Rodrigues' formula, a column at a time; an axis of no length turns nothing.
        turns = dot(axis, axis)
        flat = turn - turns * (1 - c) * (turn - around[:, None] * axis[None])
        turn = flat + s * jnp.stack([cross(around, turn[:, i]) for i in range(3)], axis=1)
        return (at, turn), (at, around)

    episodes = joints.shape[1:]
    start = (jnp.broadcast_to(base, (3, *episodes)), jnp.broadcast_to(jnp.eye(3).reshape(3, 3, *(1,) * len(episodes)), (3, 3, *episodes)))
    (at, turn), (places, axes) = jax.lax.scan(next_joint, start, (arm.links, arm.axes, joints))
    return at + rotate(turn, arm.tool[:3, 3]), times(turn, arm.tool[:3, :3]), places, axes


def _solids(setting: Setting, bodies: Bodies | State) -> Solid:
    """The bodies [BODIES, ...]; those that are not there are far away."""
    ball = setting.kind == BALL
    absent = jnp.where(setting.kind == NOTHING, FAR, 0.0)
    aside = jnp.stack([absent, 0 * absent, absent * jnp.array([1.0, 2.0])[:, None]])
    return Solid(bodies.position + aside, bodies.rotation, jnp.where(ball, 0.0, setting.half), jnp.where(ball, setting.half[0], 0.0))


def _movers(setting: Setting, state: State, hand: Hand) -> Solid:
    """What moves with the arm [MOVERS, ...]: the pads, the palm, and the held body, far away if there is none."""
    arm = setting.arm
    none = jnp.zeros_like(hand.opening)
    aside = hand.opening * arm.stroke / 2 + arm.pad[1]
    deep = -2 * arm.pad[2] - arm.palm[2]
    held = _held_one(state.held, _solids(setting, state))
    x = jnp.stack([none, none, none, state.grip_position[0]])
    y = jnp.stack([aside, -aside, none, state.grip_position[1]])
    z = jnp.stack([-arm.pad[2], -arm.pad[2], deep, state.grip_position[2]])
    centre = hand.at[:, None] + rotate(hand.turn[:, :, None], jnp.stack([x, y, z]))
    centre = centre.at[2, HELD].add(jnp.where(state.held < 0, FAR, 0.0))
    turn = hand.turn
    rotation = jnp.stack([turn, turn, turn, times(turn, state.grip_rotation)], axis=2)
    half = jnp.stack([arm.pad, arm.pad, arm.palm, held.half], axis=1)
    return Solid(centre, rotation, half, jnp.stack([none, none, none, held.rounding]))


def _held_one(held: jax.Array, solids: Solid) -> Solid:
    return jax.tree.map(lambda x: jnp.where(held == 1, x[..., 1, :], x[..., 0, :]), solids)


def _bin(setting: Setting) -> Solid:
    """The bin as one block."""
    none = jnp.zeros_like(setting.bin[0])
    centre = setting.bin + jnp.stack([none, none, BIN_BLOCK[2] - jnp.where(setting.has_bin, 0.0, FAR)])
    half = jnp.broadcast_to(jnp.asarray(BIN_BLOCK)[:, None], centre.shape)
    return Solid(centre, jnp.broadcast_to(jnp.eye(3)[..., None], (3, *centre.shape)), half, none)


def _free(setting: Setting, held: jax.Array) -> jax.Array:
    """[BODIES, ...] which bodies are there and not held."""
    return (setting.kind != NOTHING) & (jnp.arange(BODIES)[:, None] != held)


# --- a substep -----------------------------------------------------------------------------------------------------------


def _substep(
    setting: Setting, target: jax.Array, wish: jax.Array, state: State, before: Hand, pace: jax.Array
) -> tuple[State, Hand, jax.Array]:
    arm = setting.arm
    lets_go = (state.held >= 0) & (wish > before.opening + LET_GO)
    old = _movers(setting, state, before)
    state = state._replace(held=jnp.where(lets_go, -1, state.held))
    opening = before.opening + jnp.clip(wish - before.opening, -pace * arm.closing * DT, pace * arm.closing * DT)
    opening = jnp.where(state.held < 0, opening, before.opening)

    hand, bodies, touches, pressed = _yielded(setting, state, old, before, target, opening, pace)
    bodies, hand, held = _gripped(setting, state, bodies, touches, before, hand)
    deep = -gap_along(*_pairs(setting, _movers(setting, state, hand), bodies), touches.normal)
    deep = jnp.max(jnp.where(_counts(setting, state, held), deep, -FAR), axis=(0, 1))
    stays = (jnp.maximum(deep, pressed) > DEPTH) | _wedged(setting, state, bodies, held)
    hand, bodies, held = select(stays, (before, Bodies(state.position, state.rotation), state.held), (hand, bodies, held))
    state = _carried(state, bodies, hand, held)
    return _settled(setting, state, touches, hand), hand, jnp.where(stays, pace * SLOWER, 1.0)


def _pairs(setting: Setting, movers: Solid, bodies: Bodies | State) -> tuple[Solid, Solid]:
    """All that may touch [MOVERS + 1, BODIES + 1, ...]: the movers, and the other body, with each body; the movers with the bin."""
    solids = _solids(setting, bodies)
    block = jax.tree.map(lambda x: x[..., None, :], _bin(setting))
    firsts = jax.tree.map(lambda x: jnp.broadcast_to(x[..., :, None, :], (*x.shape[:-1], BODIES + 1, x.shape[-1])), movers)
    others = jax.tree.map(lambda x, y: jnp.concatenate([jnp.flip(x, -2), y], axis=-2)[..., None, :, :], solids, block)
    seconds = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=-2)[..., None, :, :], solids, block)
    firsts = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=-3), firsts, others)
    return firsts, jax.tree.map(lambda x: jnp.broadcast_to(x, (*x.shape[:-3], MOVERS + 1, *x.shape[-2:])), seconds)


def _counts(setting: Setting, state: State, held: jax.Array) -> jax.Array:
    """[MOVERS + 1, BODIES + 1, ...] which of those pairs are of two things that are there. A held ball and the bin are looked at apart."""
    free = _free(setting, held)
    every = jnp.ones_like(held, bool)
    carries = jnp.broadcast_to(state.held >= 0, held.shape)
    ball = _held_one(state.held, _solids(setting, state)).rounding > 0
    firsts = jnp.stack([every, every, every, carries])[:, None]
    on_bodies = jnp.concatenate([firsts & free, free[None, ::-1] & free])
    on_bin = jnp.stack([every, every, every, carries & ~ball, ~every]) & setting.has_bin
    return jnp.concatenate([on_bodies, on_bin[:, None]], axis=1)


def _yielded(
    setting: Setting, state: State, old: Solid, before: Hand, target: jax.Array, opening: jax.Array, pace: jax.Array
) -> tuple[Hand, Bodies, Touch, jax.Array]:
    """The hand a substep further, eased off what does not give way; the bodies, out of the way of it and of each other; how everything
    touches then; and how deep the hand is in the table, the bin or what it stands on nevertheless."""
    arm = setting.arm
    most = arm.speed * DT
    low, high = jnp.maximum(before.joints - most, arm.lower), jnp.minimum(before.joints + most, arm.upper)
    start = Bodies(state.position, state.rotation)
    old_firsts, old_seconds = _pairs(setting, old, start)
    counts = _counts(setting, state, state.held)
    on_bin = (jnp.arange(BODIES + 1) == BODIES)[:, None]

    def look(carry: tuple, number: jax.Array):
        joints, bodies, pushed = carry
        at, turn, places, axes = reached(arm, setting.base, joints)
        hand = Hand(joints, opening, at, turn)
        movers = _movers(setting, state, hand)
        firsts, seconds = _pairs(setting, movers, bodies)
        touches = touch(firsts, seconds, (firsts.centre - old_firsts.centre) - (seconds.centre - old_seconds.centre))
        stops = on_bin | (jnp.abs(touches.normal[2]) > STEEP)
        deep = jnp.where(counts, -touches.gap, -FAR)

        on_hand = jnp.where(stops, deep, -FAR)[:MOVERS]
        depth, way, point = _stop(setting, state, movers, on_hand, touches.normal[:, :MOVERS])
        rows = dot(cross(jnp.moveaxis(axes, 0, 1), point[:, None] - jnp.moveaxis(places, 0, 1)), way[:, None])
        eased = joints + rows * jnp.where(depth > 0, depth + SLACK, 0) / (jnp.sum(rows * rows, axis=0) + 1e-6)

        # Of two bodies the one that nothing else pushes gives way; of two that nothing pushes, the second.
        yields = ~pushed & (pushed[::-1] | (jnp.arange(BODIES) == 1)[:, None])
        on_bodies = jnp.where(stops, -FAR, deep)[:, :BODIES]
        by_hand = jnp.max(on_bodies[:MOVERS], axis=0) > 0
        on_bodies = on_bodies.at[OTHER].set(jnp.where(yields, on_bodies[OTHER], -FAR))
        new = _aside(setting, seconds, on_bodies, touches, firsts, old_firsts, number == 0)
        new = Bodies(*select(jnp.max(on_bodies, axis=0) > 0, tuple(new), tuple(bodies)))
        clasped = _clasped(setting, state, touches, before, hand)
        new = Bodies(*select(clasped, tuple(_between(setting, bodies, hand)[0]), tuple(new)))
        return (jnp.clip(eased, low, high), new, pushed | by_hand), (hand, bodies, touches, depth)

    first = (before.joints + jnp.clip(target - before.joints, -most * pace, most * pace), start, jnp.zeros_like(counts[OTHER, :BODIES]))
    _, looks = jax.lax.scan(look, first, jnp.arange(LOOKS))
    return jax.tree.map(lambda x: x[-1], looks)


def _stop(setting: Setting, state: State, movers: Solid, deep: jax.Array, normals: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How deep the hand is in what does not give way, the way out, and where that is."""
    up = jnp.zeros_like(movers.centre).at[2].set(1)
    on_table = reach(movers, up) - movers.centre[2]
    on_table = on_table.at[HELD].set(jnp.where(state.held < 0, -FAR, on_table[HELD]))
    gap, away = out_of_bin(movers.centre[:, HELD], movers.rounding[HELD], setting.bin)
    on_bin = jnp.where((movers.rounding[HELD] > 0) & setting.has_bin & (state.held >= 0), -gap, -FAR)
    both, which = best(jnp.moveaxis(deep, 1, 0), tuple(jnp.moveaxis(-normals, 2, 1)))  # of each mover
    ways = jnp.concatenate([up, jnp.stack(which), away[:, None]], axis=1)
    solids = jax.tree.map(lambda x: jnp.concatenate([x, x, x[..., HELD, None, :]], axis=-2), movers)
    depth, (way, point) = best(
        jnp.concatenate([on_table, both, on_bin[None]]), (jnp.moveaxis(ways, 1, 0), jnp.moveaxis(foremost(solids, -ways), 1, 0))
    )
    return depth, way, point


# --- bodies that are pushed ----------------------------------------------------------------------------------------------


def _aside(setting: Setting, seconds: Solid, depths: jax.Array, touches: Touch, firsts: Solid, old: Solid, first: jax.Array) -> Bodies:
    """The bodies, each pushed out of its deepest contact [MOVERS + 1, BODIES, ...] by what was elsewhere before."""
    body = jax.tree.map(lambda x: x[..., 0, :BODIES, :], seconds)
    contact = (touches.normal, firsts, old.centre, old.rotation)
    by_mover = jax.tree.map(lambda x: jnp.moveaxis(x[..., :BODIES, :], -3, 0), contact)
    deep, (normal, mover, was_at, was_turned) = best(depths, by_mover)
    level = jnp.sqrt(normal[0] ** 2 + normal[1] ** 2)
    left = left_of(normal)
    ahead = jnp.stack([left[1], -left[0], left[2]])
    # All that touches this side as deeply, as two closed pads do, touches as one.
    alike = (depths > deep - FACE) & (dot(touches.normal[:, :, :BODIES], normal[:, None]) > 0.99)
    low, high = edge(jax.tree.map(lambda x: x[..., :BODIES, :], firsts), normal[:, None], left[:, None])
    low, high = jnp.min(jnp.where(alike, low, FAR), axis=0), jnp.max(jnp.where(alike, high, -FAR), axis=0)
    least, most = edge(body, -normal, left)
    low, high = (x - dot(body.centre, left) for x in (jnp.maximum(low, least), jnp.minimum(high, most)))
    low, high = jnp.minimum(low, (low + high) / 2), jnp.maximum(high, (low + high) / 2)
    back = reach(body, ahead)
    at = body.centre - ahead * back + left * (low + high) / 2
    was = was_at + rotate(was_turned, unrotate(mover.rotation, at - mover.centre))  # this point of the mover, before
    depth = jnp.maximum(deep, 0) / jnp.maximum(level, 1e-6) + SLACK
    slide = jnp.where(first, dot(at - was, left), 0.0)
    way = give_way(depth, slide, back, low, high, _friction_arm(body), jnp.where(first, FRICTION, 0.0))
    ball = setting.kind == BALL
    forward, aside, yaw = jnp.where(ball, depth, way[0]), jnp.where(ball, 0.0, way[1]), jnp.where(ball, 0.0, way[2])
    return Bodies(body.centre + ahead * forward + left * aside, times(turned(yaw), body.rotation))


def _friction_arm(body: Solid) -> jax.Array:
    """Of a body as it lies: of its footprint."""
    upright = body.rotation[2] ** 2  # about 1 for one axis, 0 for the others
    tall = dot(upright, body.half)
    both = body.half[0] + body.half[1] + body.half[2] - tall
    a = jnp.maximum(jnp.max(jnp.where(upright > 0.5, 0.0, body.half), axis=0), 1e-3)
    return friction_arm(a, jnp.maximum(both - a, 1e-3))


# --- gripping ------------------------------------------------------------------------------------------------------------


def _between(setting: Setting, bodies: Bodies, hand: Hand) -> tuple[Bodies, jax.Array, jax.Array]:
    """The bodies, if they were between pads that close on them: turned until they fit, or lie flat, and moved to the pads' middle.

    And half the width [BODIES, ...] of each where it lies flat, and how far it is from that, in radians.
    """
    arm = setting.arm
    y = jnp.stack([hand.turn[0, 1], hand.turn[1, 1], jnp.zeros_like(hand.opening)])
    y = y / jnp.maximum(size(y), 1e-3)
    x = jnp.stack([y[1], -y[0], y[2]])
    along_x = unrotate(hand.turn, x)
    broad = jnp.abs(along_x[0]) * arm.pad[0] + jnp.abs(along_x[2]) * arm.pad[2]  # half a pad, across
    middle = hand.at - hand.turn[:, 2] * arm.pad[2]

    solids = _solids(setting, bodies)
    cosines = unrotate(solids.rotation, jnp.broadcast_to(y[:, None], solids.centre.shape))
    axes = tuple(solids.rotation[i] * jnp.sign(cosines) for i in range(2))
    _, (ax, ay, thick) = best(jnp.abs(cosines), (*axes, solids.half))
    off = jnp.arctan2(ax * x[0] + ay * x[1], ax * y[0] + ay * y[1])  # the yaw, as seen from the pads, of the face that is nearest to them
    ball = setting.kind == BALL
    off, thick = jnp.where(ball, 0.0, off), jnp.where(ball, solids.rounding, thick)
    long = solids.half[0] + solids.half[1] + solids.half[2] - thick - dot(solids.rotation[2] ** 2, solids.half)
    c, s = jnp.cos(off), jnp.abs(jnp.sin(off))
    takes = jnp.minimum(thick / c + broad * s / c, thick * c + long * s)  # pads lie on its faces, or on its corners
    room = hand.opening * arm.stroke / 2 - SLACK
    left = off * jnp.clip((room - thick) / jnp.maximum(takes - thick, 1e-6), 0, 1)  # its width grows faster than the angle: this fits
    away = solids.centre - middle[:, None]
    level = dot(hand.turn[:, 1], y)  # pads that lean are further to the side at another height
    off_middle = dot(away, hand.turn[:, 1][:, None]) / jnp.maximum(level, 1e-3)
    aside = -dot(away, x[:, None]) * jnp.tan(left) - off_middle
    return Bodies(solids.centre + aside * y[:, None], times(turned(off - left), solids.rotation)), thick, left


def _clasped(setting: Setting, state: State, touches: Touch, before: Hand, hand: Hand) -> jax.Array:
    """[BODIES, ...] which bodies closing pads touch from both sides."""
    facing = dot(touches.normal[:, PADS, :BODIES], hand.turn[:, 1][:, None, None])  # pad 0 is on the side of y
    both = jnp.all(touches.gap[PADS, :BODIES] < NEAR, axis=0) & (facing[0] <= -CONE) & (facing[1] >= CONE)
    return both & _free(setting, state.held) & (hand.opening < before.opening) & (state.held < 0)


def _gripped(setting: Setting, state: State, bodies: Bodies, touches: Touch, before: Hand, hand: Hand) -> tuple[Bodies, Hand, jax.Array]:
    """What closing pads touch from both sides and what lies flat between them is held from now on."""
    between, thick, off = _between(setting, bodies, hand)
    holds = _clasped(setting, state, touches, before, hand) & (jnp.abs(off) < FLAT)
    # As open as it is broad; pads that lean against it touch it with their edges, and stay further open.
    wide = jnp.maximum(2 * thick, hand.opening * setting.arm.stroke + 2 * jnp.max(_dents(setting, state, between, hand)[PADS], axis=0))
    opening = jnp.maximum(hand.opening, jnp.max(jnp.where(holds, wide, 0), axis=0) / setting.arm.stroke)
    fitted = hand._replace(opening=opening)
    holds = holds & (jnp.max(_dents(setting, state, between, fitted), axis=0) < DEPTH)
    held = jnp.where(state.held >= 0, state.held, jnp.where(holds[0], 0, jnp.where(holds[1], 1, -1)))
    return (
        Bodies(*select(holds, tuple(between), tuple(bodies))),
        Hand(*select(jnp.any(holds, axis=0), tuple(fitted), tuple(hand))),
        held,
    )


def _dents(setting: Setting, state: State, bodies: Bodies, hand: Hand) -> jax.Array:
    """How deep the pads and the palm are in bodies [3, BODIES, ...]."""
    parts = jax.tree.map(lambda x: x[..., :HELD, None, :], _movers(setting, state, hand))
    return -face_gap(parts, jax.tree.map(lambda x: x[..., None, :, :], _solids(setting, bodies)))


def _wedged(setting: Setting, state: State, bodies: Bodies, held: jax.Array) -> jax.Array:
    """Whether a ball that is not held has been pushed into the bin's walls, or further into them."""
    radius, bin_at = _solids(setting, bodies).rounding, setting.bin[:, None]
    new, old = (-out_of_bin(position, radius, bin_at)[0] for position in (bodies.position, state.position))
    balls = (setting.kind == BALL) & _free(setting, held) & setting.has_bin
    return jnp.any(balls & (new > DEPTH) & (new > old), axis=0)


def _carried(state: State, bodies: Bodies, hand: Hand, held: jax.Array) -> State:
    """The state with the hand where it is now, and the held body in it."""
    new = (held >= 0) & (state.held < 0)
    which = jnp.arange(BODIES)[:, None] == held
    position = jnp.sum(jnp.where(which, bodies.position, 0), axis=1)
    rotation = jnp.sum(jnp.where(which, bodies.rotation, 0), axis=2)
    grip_position = jnp.where(new, unrotate(hand.turn, position - hand.at), state.grip_position)
    grip_rotation = jnp.where(new, times(jnp.swapaxes(hand.turn, 0, 1), rotation), state.grip_rotation)
    return state._replace(
        joints=hand.joints,
        opening=hand.opening,
        held=held,
        grip_position=grip_position,
        grip_rotation=grip_rotation,
        position=jnp.where(which, (hand.at + rotate(hand.turn, grip_position))[:, None], bodies.position),
        rotation=jnp.where(which, times(hand.turn, grip_rotation)[:, :, None], bodies.rotation),
        falling=jnp.where(which, 0.0, state.falling),
    )


# --- falling, tipping, settling ------------------------------------------------------------------------------------------


def _settled(setting: Setting, state: State, touches: Touch, hand: Hand) -> State:
    """What is not held falls onto what is below it, tips onto a face, slides off what it overhangs."""
    solids = _solids(setting, state)
    position, rotation, falling = fallen(setting, solids, _bin(setting), state.falling)
    movers = _movers(setting, state, hand)
    firsts, seconds = _pairs(setting, movers, state)
    new = _pairs(setting, movers, Bodies(position, rotation))[1]
    was, deep = (-gap_along(firsts, them, touches.normal) for them in (seconds, new))
    hindered = jnp.any(_counts(setting, state, state.held) & (deep > DEPTH) & (deep > was), axis=0)[:BODIES]
    free = _free(setting, state.held)
    goes = free & ~hindered
    return state._replace(
        position=jnp.where(goes, position, state.position),
        rotation=jnp.where(goes, rotation, state.rotation),
        falling=jnp.where(goes, falling, 0.0),
    )
