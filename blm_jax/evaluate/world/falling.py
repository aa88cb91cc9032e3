"""What happens to a body that nothing holds: it falls, lands, tips onto a face, slides off an edge, or finds its way in the bin."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blm_jax.evaluate.world.contact import (
    DEPTH,
    NEAR,
    SLACK,
    STEEP,
    Solid,
    best,
    face_gap,
    foremost,
    leaned,
    out_of_bin,
    reach,
    rotate,
    size,
    times,
    unrotate,
)
from blm_jax.evaluate.world.scene import BALL, BODIES, DT, Setting

GRAVITY = 9.81
SLIDE = 0.3  # metres a second: how fast a box that overhangs slides off
TIP = 4.0  # radians a second: how fast a body tips over


def fallen(setting: Setting, body: Solid, block: Solid, falling: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bodies a substep later, if no hand were there: their places, rotations, and speeds downward. `block` is all of the bin."""
    ball = setting.kind == BALL
    up = jnp.broadcast_to(jnp.array([0.0, 0, 1]).reshape(3, 1, 1), body.centre.shape)
    high = reach(body, up)
    block = jax.tree.map(lambda x: jnp.broadcast_to(jnp.expand_dims(x, -2), (*x.shape[:-1], BODIES, x.shape[-1])), block)
    below = jax.tree.map(lambda a, b: jnp.stack([jnp.flip(a, -2), b], axis=-3), body, block)  # [2 supports, BODIES, ...]
    tops = below.centre[2] + reach(below, up[:, None])
    lifted = body.centre[:, None] + up[:, None] * (tops + high - NEAR - body.centre[2])
    bodies = jax.tree.map(lambda x: jnp.broadcast_to(jnp.expand_dims(x, -3), (*x.shape[:-2], 2, *x.shape[-2:])), body)
    overlaps = face_gap(bodies._replace(centre=lifted), below) < -SLACK
    carries = overlaps & (body.centre[2] - high > tops - 2 * DEPTH)
    carries = jnp.stack([carries[0], carries[1] & ~ball])
    floor = jnp.maximum(jnp.max(jnp.where(carries, tops, 0.0), axis=0), 0.0)
    rest = floor + high

    speed = falling + GRAVITY * DT
    z = jnp.maximum(body.centre[2] - speed * DT, rest)
    speed = jnp.where(z <= rest, 0.0, speed)
    lies = body.centre[2] <= rest + NEAR

    # Its middle beyond the edge of what carries it: it slides off.
    away = body.centre[:, None] - below.centre
    away = jnp.stack([away[0], away[1], 0 * away[2]])
    inside = (jnp.abs(unrotate(below.rotation, away)) <= below.half) | (jnp.abs(below.rotation[2]) > STEEP)
    slips = carries & (tops >= floor) & ~jnp.all(inside, axis=0) & lies
    out = jnp.sum(jnp.where(slips, away, 0), axis=1)
    out = out / jnp.maximum(size(out), 1e-6)
    centre = jnp.stack([body.centre[0], body.centre[1], z]) + out * SLIDE * DT

    # It tips towards the face that is below its middle, about its lowest corner or edge.
    cosines = body.rotation[2]
    _, face = best(jnp.abs(cosines) / jnp.maximum(body.half, 1e-6), tuple(body.rotation[i] * jnp.sign(cosines) for i in range(3)))
    level = jnp.sqrt(face[0] ** 2 + face[1] ** 2)
    angle = jnp.arctan2(level, face[2])
    tips = lies & ~ball & (angle > 1e-5)
    by = jnp.where(tips, jnp.minimum(angle, TIP * DT), 0.0)
    lean = leaned(face[1] / jnp.maximum(level, 1e-9), -face[0] / jnp.maximum(level, 1e-9), by)
    rotation = times(lean, body.rotation)
    pivot = foremost(body, -up) - body.centre
    tipped = centre + pivot - rotate(lean, pivot)
    tipped = tipped.at[2].set(floor + reach(body._replace(rotation=rotation), up))
    centre = jnp.where(tips, tipped, centre)

    # A ball finds its way on the bin's walls.
    gap, way = out_of_bin(centre, body.rounding, setting.bin[:, None])
    hits = ball & setting.has_bin & (gap < 0)
    rolled = centre - way * gap
    rolled = rolled.at[2].set(jnp.maximum(rolled[2], body.rounding))
    speed = jnp.where(hits, jnp.maximum((body.centre[2] - rolled[2]) / DT, 0.0), speed)
    return jnp.where(hits, rolled, centre), rotation, jnp.where(speed < 2e-3, 0.0, speed)
