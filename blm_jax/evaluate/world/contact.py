"""When two solids touch, where, and how a body gives way on a table.

A solid is a box with rounded edges: a ball is a box of no size. Two of them are apart if they are apart along one of sixteen axes: the
faces of either, the products of their edges, and the line from the nearest point of one to that of the other (the one that counts for
balls).

Vectors are [3, ...] and matrices [3, 3, ...]: whatever comes after is pairs and episodes, with episodes last. So sums over three
components are sums of three long rows, which is what makes thousands of episodes fast.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# PlaceSphere's bin: a plate and four walls, by their middles and half sizes. The room inside is as broad as the ball.
_WALL, _ACROSS = 0.0025, 0.025
BIN_CENTRES = np.array([(0, 0, 0.0025), (-0.0225, 0, 0.01), (0.0225, 0, 0.01), (0, -0.0225, 0.01), (0, 0.0225, 0.01)], np.float32)
BIN_HALVES = np.array(
    [(_ACROSS, _ACROSS, _WALL)] + [(_WALL, _ACROSS, 2 * _WALL)] * 2 + [(_ACROSS, _WALL, 2 * _WALL)] * 2,
    np.float32,
)
BIN_BLOCK = np.array((_ACROSS, _ACROSS, 0.0075), np.float32)  # half sizes of all of it
BALL_IN_BIN = 0.025  # how high a ball's middle lies in it

FACE = 4e-4  # metres that the ends of an edge may differ in depth, and all of it touches
STEEP = 0.7  # of a contact's normal: what is steeper does not push a body aside but stops the hand
SLACK = 1e-5  # metres left between what was pushed and what pushed it
DEPTH = 5e-4  # metres: a hand that would go deeper stays where it is
NEAR = 2e-4  # metres: a pad this near touches
WITHIN = 1e-5  # metres: a ball whose middle is nearer than this to a box is as good as inside of it


Tree = TypeVar("Tree")


class Solid(NamedTuple):
    centre: jax.Array  # [3, ...]
    rotation: jax.Array  # [3, 3, ...], columns are its axes
    half: jax.Array  # [3, ...] without the rounding
    rounding: jax.Array  # [...]


class Touch(NamedTuple):
    gap: jax.Array  # [...] metres between the two; negative is how deep they are in each other
    normal: jax.Array  # [3, ...] from the first to the second


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def size(a: jax.Array) -> jax.Array:
    return jnp.sqrt(dot(a, a))


def rotate(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """matrix @ vector."""
    return matrix[:, 0] * vector[0] + matrix[:, 1] * vector[1] + matrix[:, 2] * vector[2]


def unrotate(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """matrix.T @ vector."""
    return matrix[0] * vector[0] + matrix[1] * vector[1] + matrix[2] * vector[2]


def times(left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right."""
    return left[:, 0, None] * right[0] + left[:, 1, None] * right[1] + left[:, 2, None] * right[2]


def turned(yaw: jax.Array) -> jax.Array:
    """The rotation about the vertical."""
    c, s = jnp.cos(yaw), jnp.sin(yaw)
    none = jnp.zeros_like(c)
    return jnp.stack([jnp.stack([c, -s, none]), jnp.stack([s, c, none]), jnp.stack([none, none, none + 1])])


def leaned(x: jax.Array, y: jax.Array, angle: jax.Array) -> jax.Array:
    """The rotation about the horizontal unit axis (x, y, 0)."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    rows = [[c + x * x * (1 - c), x * y * (1 - c), y * s], [x * y * (1 - c), c + y * y * (1 - c), -x * s], [-y * s, x * s, c]]
    return jnp.stack([jnp.stack(row) for row in rows])


def select(mask: jax.Array, a: Tree, b: Tree) -> Tree:
    """`jnp.where` of trees whose leaves end with the mask's axes."""
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), a, b)


def best(score: jax.Array, values: Any) -> tuple[jax.Array, Any]:
    """The values, trees of [k, ...], at the greatest score [k, ...]; the first of equals. An argmax would not be a pass over long rows."""

    def better(so_far, one):
        return select(one[0] > so_far[0], one, so_far), None

    first, rest = (jax.tree.map(lambda x, part=part: x[part], (score, values)) for part in (0, slice(1, None)))
    return jax.lax.scan(better, first, rest)[0]


def reach(solid: Solid, direction: jax.Array) -> jax.Array:
    """How far a solid goes from its middle in a direction."""
    return dot(jnp.abs(unrotate(solid.rotation, direction)), solid.half) + solid.rounding


def gap_along(first: Solid, second: Solid, normal: jax.Array) -> jax.Array:
    """The gap along one direction: no more than the true one."""
    return dot(second.centre - first.centre, normal) - reach(first, normal) - reach(second, normal)


def face_gap(first: Solid, second: Solid) -> jax.Array:
    """The gap along the faces of either alone: the true one where both are upright, and never more than it."""
    line = second.centre - first.centre
    a, b = first.rotation, second.rotation
    sizes = jnp.abs(a[0][:, None] * b[0] + a[1][:, None] * b[1] + a[2][:, None] * b[2])  # [3 of a, 3 of b, ...]
    of_a = (
        jnp.abs(unrotate(a, line)) - first.half - sizes[:, 0] * second.half[0] - sizes[:, 1] * second.half[1] - sizes[:, 2] * second.half[2]
    )
    of_b = jnp.abs(unrotate(b, line)) - second.half - sizes[0] * first.half[0] - sizes[1] * first.half[1] - sizes[2] * first.half[2]
    return jnp.max(jnp.maximum(of_a, of_b), axis=0) - first.rounding - second.rounding


def touch(first: Solid, second: Solid, moved: jax.Array) -> Touch:
    """How two solids touch, `moved` being how far the first came, as seen from the second, since they were apart.

    Solids that meet do so along the axis on which they were apart last; without that, a hand that comes down fast on the edge of a
    cube would seem to have come from the side.
    """
    line = second.centre - first.centre
    a, b = first.rotation, second.rotation
    line_a, moved_a = unrotate(a, line), unrotate(a, moved)  # [3, ...]
    cosines = a[0][:, None] * b[0] + a[1][:, None] * b[1] + a[2][:, None] * b[2]  # [3 of a, 3 of b, ...]
    sizes = jnp.abs(cosines)
    half_a, half_b = first.half[:, None], second.half[None]

    # The faces of either, and the products of an edge of each.
    reach_a = first.half + sizes[:, 0] * second.half[0] + sizes[:, 1] * second.half[1] + sizes[:, 2] * second.half[2]
    reach_b = second.half + sizes[0] * first.half[0] + sizes[1] * first.half[1] + sizes[2] * first.half[2]
    after, last = partial(jnp.roll, shift=-1, axis=0), partial(jnp.roll, shift=-2, axis=0)  # the other two axes
    length = jnp.sqrt(jnp.maximum(1 - cosines * cosines, 1e-6))
    counts = sizes < 1 - 1e-6
    reach_ab = after(half_a) * last(sizes) + last(half_a) * after(sizes)
    reach_ab = reach_ab + jnp.roll(half_b, -1, 1) * jnp.roll(sizes, -2, 1) + jnp.roll(half_b, -2, 1) * jnp.roll(sizes, -1, 1)
    reach_ab = reach_ab / length

    def on_edges(v: jax.Array) -> jax.Array:  # v in the frame of the first
        return (last(v)[:, None] * after(cosines) - after(v)[:, None] * last(cosines)) / length

    near_a = rotate(a, jnp.clip(line_a, -first.half, first.half))
    near_b = rotate(b, jnp.clip(-unrotate(b, line), -second.half, second.half))
    nearest = line + near_b - near_a
    outside = size(nearest)  # of a middle that is within the other solid there is only rounding, and no direction
    nearest = nearest / jnp.maximum(outside, 1e-6)
    round_ends = first.rounding + second.rounding
    has_ends = (round_ends > 0) & (outside > WITHIN)
    ends = dot(jnp.abs(unrotate(a, nearest)), first.half) + dot(jnp.abs(unrotate(b, nearest)), second.half)

    edges = cross(a[:, :, None], b[:, None, :]) / length  # [3, 3 of a, 3 of b, ...]
    whole = jnp.broadcast_shapes(a.shape[2:], b.shape[2:])

    def all_axes(of_a: jax.Array, of_b: jax.Array, of_edges: jax.Array, of_ends: jax.Array) -> jax.Array:
        parts = (of_a, of_b, of_edges.reshape(9, *of_edges.shape[2:]), of_ends[None])
        return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], *whole)) for x in parts])

    reaches = all_axes(reach_a, reach_b, jnp.where(counts, reach_ab, jnp.inf), jnp.where(has_ends, ends, jnp.inf)) + round_ends
    now = all_axes(line_a, unrotate(b, line), on_edges(line_a), dot(nearest, line))
    before = now + all_axes(moved_a, unrotate(b, moved), on_edges(moved_a), dot(nearest, moved))
    axes = [all_axes(a[i], b[i], edges[i], nearest[i]) for i in range(3)]
    counted = reaches < jnp.inf

    gaps = jnp.where(counted, jnp.abs(now) - reaches, -jnp.inf)
    gaps_before = jnp.where(counted, jnp.abs(before) - reaches, -jnp.inf)
    side = jnp.where(before < 0, -1.0, 1.0)
    deep = jnp.where(counted, now * side - reaches, -jnp.inf)
    met = gaps_before / jnp.maximum(gaps_before - deep, 1e-9)  # when, as a part of the way
    apart = jnp.max(gaps, axis=0) > 0
    score = jnp.where(apart, gaps, jnp.where(gaps_before > 0, met, jnp.minimum(deep, 0)))
    side = jnp.where(apart, jnp.where(now < 0, -1.0, 1.0), side)
    gap = jnp.where(apart, gaps, deep)
    _, (gap, *normal) = best(score, (gap, *(axis * side for axis in axes)))
    return Touch(gap, jnp.stack(normal))


def left_of(normal: jax.Array) -> jax.Array:
    """The horizontal unit vector 90 degrees left of a direction."""
    left = jnp.stack([-normal[1], normal[0], jnp.zeros_like(normal[0])])
    return left / jnp.maximum(size(left), 1e-6)


def edge(solid: Solid, direction: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From where to where, along `left`, the part of a solid goes that is foremost in a direction."""
    ahead, across = unrotate(solid.rotation, direction), unrotate(solid.rotation, left)
    whole = jnp.abs(ahead) * 2 * solid.half < FACE  # this axis of the box lies across: all of it is foremost
    middle = dot(jnp.where(whole, 0, jnp.sign(ahead)) * solid.half, across) + dot(solid.centre, left)
    extent = dot(jnp.where(whole, solid.half, 0), jnp.abs(across))
    return middle - extent, middle + extent


def foremost(solid: Solid, direction: jax.Array) -> jax.Array:
    """The middle of the part of a solid that is foremost in a direction."""
    ahead = unrotate(solid.rotation, direction)
    whole = jnp.abs(ahead) * 2 * solid.half < FACE
    corner = rotate(solid.rotation, jnp.where(whole, 0, jnp.sign(ahead)) * solid.half)
    return solid.centre + corner + direction * solid.rounding


def friction_arm(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean distance of a rectangle's points from its middle, of half sides a and b: the torque that turns a body of that footprint,
    over the force that slides it, where it weighs on the table evenly."""
    d = jnp.sqrt(a * a + b * b)
    return (d + a * a / (2 * b) * jnp.arcsinh(b / a) + b * b / (2 * a) * jnp.arcsinh(a / b)) / 3


def give_way(
    depth: jax.Array, slide: jax.Array, back: jax.Array, low: jax.Array, high: jax.Array, arm: jax.Array, friction: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How a body on a table moves (along the normal, left of it, in yaw) as it is pushed by `depth` and dragged by `slide`.

    Its limit surface is an ellipsoid: the motion is (force, torque / arm^2) to a factor. The contact lies `back` behind the body's
    middle and goes from `low` to `high` left of it. The body does not turn if a force somewhere on the contact lets it; else it turns about
    the contact's end. There it sticks if the force that this takes is in the friction cone, and slides at the cone's edge if not.
    """
    along = jnp.clip(-back * jnp.clip(slide / depth, -friction, friction), low, high)
    a, b = -back / arm, along / arm
    # Motion of the contact = [[1 + b^2, -a b], [-a b, 1 + a^2]] force.
    forward = ((1 + a * a) * depth + a * b * slide) / (1 + a * a + b * b)
    left = (a * b * depth + (1 + b * b) * slide) / (1 + a * a + b * b)
    sticks = jnp.abs(left) <= friction * forward
    cone = friction * jnp.sign(left)
    slipping = depth / jnp.maximum(1 + b * b - cone * a * b, 0.1)
    forward = jnp.where(sticks, forward, slipping)
    left = jnp.where(sticks, left, cone * slipping)
    return forward, left, (a * left - b * forward) / arm


def out_of_bin(centre: jax.Array, radius: jax.Array, bin_at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A ball's gap to the bin, and the way [3, ...] out of it."""
    place = (..., *(None,) * (centre.ndim - 1))
    away = (centre - bin_at)[None] - jnp.asarray(BIN_CENTRES)[place]  # [5, 3, ...]
    off = away - jnp.clip(away, -jnp.asarray(BIN_HALVES)[place], jnp.asarray(BIN_HALVES)[place])
    distance = jnp.sqrt(off[:, 0] ** 2 + off[:, 1] ** 2 + off[:, 2] ** 2)
    far, off = best(-distance, (off[:, 0], off[:, 1], off[:, 2]))
    off = jnp.stack(off)
    up = jnp.zeros_like(off).at[2].set(1)
    return -far - radius, jnp.where(far < -1e-6, off / jnp.maximum(-far, 1e-6), up)
