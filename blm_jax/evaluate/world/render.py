"""Pictures of a scene: rays against shapes in closed form, Lambert's shading, one sun and the shadows it casts.

What the hot path holds are lone arrays of one number a ray, x, y and z apart: on a CPU as on a TPU, an inner axis of three would leave
most of each vector register empty. Shapes of a kind are looped over, which compiles each kind once: written out one by one, a scene's
twenty took half a minute to compile and ran no faster. Those that a scene has come first, and no loop goes beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blm_jax.evaluate.world.scene import Shapes

# Where in a pixel its rays go: two on a diagonal halve the steps that an edge takes, along either axis.
SAMPLES = ((0.25, 0.25), (0.75, 0.75))
CHUNK = 16  # pictures at a time: larger ones leave a processor's caches
FAR = 1e6
TINY = 1e-9
LIFT = 2e-4  # metres, that rays to the sun begin before a surface: rounding would put some behind it

TABLE = ((-0.75, 0.55), (-0.6, 0.6))  # x and y
RIM = 0.02  # metres
COLOURS = {"table": (0.66, 0.65, 0.63), "rim": (0.42, 0.36, 0.31), "floor": (0.46, 0.49, 0.53), "wall": (0.80, 0.83, 0.86)}
SHADE = 0.3  # of red and blue, by which the table's tone changes a metre along y and x: any patch of it tells where it is
AMBIENT, WRAP, SUN = 0.52, 0.1, 0.5  # of light: everywhere, more where a surface looks to the sun, and the sun's own


class Camera(NamedTuple):
    """A pinhole; pictures are square."""

    position: Any  # [3]
    target: Any  # [3] what the middle of the picture shows
    up: Any  # [3]
    field: Any  # [] of view, radians


class V(NamedTuple):
    """A vector, or one for each ray."""

    x: jax.Array
    y: jax.Array
    z: jax.Array


def _sun() -> V:
    x, y, z = np.array([0.3, -0.45, 1.0]) / np.linalg.norm([0.3, -0.45, 1.0])
    return V(np.float32(x), np.float32(y), np.float32(z))  # type: ignore[arg-type]


TO_SUN = _sun()


class Kind(NamedTuple):
    """The shapes of one kind in a scene, those first that have a size."""

    shape: tuple[jax.Array, ...]  # what tells where each is, [shapes, ...]
    paint: jax.Array  # [shapes, channels]
    count: jax.Array  # [] int32 of those with a size


def picture(shapes: Shapes, camera: Camera, size: int) -> jax.Array:
    """One picture [size, size, 3] uint8, row 0 on top."""
    return _picture(_coloured(shapes), camera, size)


def _picture(kinds: Sequence[Kind], camera: Camera, size: int) -> jax.Array:
    origin, rays = _rays(camera, size, SAMPLES)
    colour, light, place = _seen(kinds, origin, rays)
    bright = AMBIENT + light * WRAP + jnp.where(_in_shadow(kinds, place), 0, jnp.maximum(light, 0) * SUN)
    near, signs = _signs_before(kinds, origin, rays)
    channels = [jnp.where(near < FAR, sign, jnp.clip(channel * bright, 0, 1)) for sign, channel in zip(signs, colour, strict=True)]
    pixels = [jnp.mean(channel.reshape(len(SAMPLES), size, size), axis=0) for channel in channels]
    return jnp.round(jnp.stack(pixels, axis=-1) * 255).astype(jnp.uint8)


def pictures(shapes: Shapes, camera: Camera, size: int) -> jax.Array:
    """Of a batch of scenes by one camera, [batch, size, size, 3]."""
    batch = len(shapes.box_half)
    chunk = max(size for size in range(1, CHUNK + 1) if batch % size == 0)

    def some(shapes: Shapes) -> jax.Array:
        # One count for all scenes of a chunk: each scene's own would make masks of the loops' ends.
        every = jax.vmap(_coloured)(shapes)
        counts = [jnp.max(kind.count) for kind in every]

        def one(kinds: list[Kind]) -> jax.Array:
            return _picture([kind._replace(count=count) for kind, count in zip(kinds, counts, strict=True)], camera, size)

        return jax.vmap(one)(every)

    made = jax.lax.map(some, jax.tree.map(lambda leaf: leaf.reshape(batch // chunk, chunk, *leaf.shape[1:]), shapes))
    return made.reshape(batch, *made.shape[2:])


def first_seen(shapes: Shapes, camera: Camera, size: int) -> tuple[jax.Array, jax.Array]:
    """Which shape the first ray of each pixel meets, and how far away, both [size, size].

    Shapes are numbered: boxes first, then balls, rods, drums and signs; -1 is none of them.
    """
    counts = [len(size) for size in (shapes.box_half, shapes.ball_radius, shapes.rod_radius, shapes.drum_radius, shapes.sign_radius)]
    numbers = jnp.split(jnp.arange(sum(counts), dtype=jnp.float32)[:, None], np.cumsum(counts[:-1]))
    origin, rays = _rays(camera, size, SAMPLES[:1])
    kinds = _kinds(shapes, numbers)
    (seen,), _, place = _seen(kinds, origin, rays)
    near, (sign,) = _signs_before(kinds, origin, rays)
    away = _minus(place, origin)
    seen, distance = jnp.where(near < FAR, sign, seen), jnp.where(near < FAR, near, jnp.sqrt(_dot(away, away)) + LIFT)
    return seen.reshape(size, size).astype(jnp.int32), distance.reshape(size, size)


def project(camera: Camera, points: Any, size: int) -> tuple[Any, Any]:
    """Where points [..., 3] of a NumPy or JAX array are in the picture: column and row in pixels, and how far ahead [...]."""
    numpy = np if isinstance(points, np.ndarray) else jnp
    ahead, right, up = look_at(camera, numpy)
    away = points - numpy.asarray(camera.position)
    depth = away @ ahead
    scale = size / 2 / numpy.tan(camera.field / 2)
    return numpy.stack([size / 2 + scale * (away @ right) / depth, size / 2 - scale * (away @ up) / depth], axis=-1), depth


def look_at(camera: Camera, numpy: Any = jnp) -> tuple[Any, Any, Any]:
    """The camera's axes in the world: ahead, right and up."""
    ahead = _unit(numpy.asarray(camera.target, np.float32) - numpy.asarray(camera.position, np.float32), numpy)
    right = _unit(numpy.cross(ahead, numpy.asarray(camera.up, np.float32)), numpy)
    return ahead, right, numpy.cross(right, ahead)


# --- rays ----------------------------------------------------------------------------------------------------------------


def _rays(camera: Camera, size: int, samples: Sequence[tuple[float, float]]) -> tuple[V, V]:
    """Where all begin, and where each goes [samples * rows * columns], at unit length."""
    # A camera that is a constant is kept from being folded in: that rounds otherwise, and some pixels would differ by a level.
    camera = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, camera))
    axes = look_at(camera)
    half = jnp.tan(camera.field / 2)
    steps = np.arange(size)
    down, along = [
        np.concatenate([np.broadcast_to(grid + at[i], (size, size)).ravel() for at in samples])
        for i, grid in ((0, steps[:, None]), (1, steps))
    ]
    right, up = jnp.asarray(2 * along / size - 1, jnp.float32) * half, jnp.asarray(1 - 2 * down / size, jnp.float32) * half
    x, y, z = (axes[0][i] + right * axes[1][i] + up * axes[2][i] for i in range(3))
    shrink = jax.lax.rsqrt(x * x + y * y + z * z)
    return _vector(camera.position), V(x * shrink, y * shrink, z * shrink)


def _seen(kinds: Sequence[Kind], origin: V, rays: V) -> tuple[tuple[jax.Array, ...], jax.Array, V]:
    """What rays meet first: its paint, how much it looks to the sun, and the place, a little towards the camera.

    Paint of three channels is a colour; of one, what is no shape has -1.
    """
    down = jnp.minimum(rays.z, -TINY)
    distance = jnp.where(rays.z < -1e-4, -origin.z / down, FAR)
    ground = _along(origin, rays, distance)
    paint = _ground(ground, distance < FAR) if kinds[0].paint.shape[1] == 3 else (jnp.full_like(distance, -1),)
    found = (distance, jnp.broadcast_to(TO_SUN.z, distance.shape), paint)
    for meet, kind in _some(kinds):

        def nearer(i: jax.Array, best: Any, meet: Callable = meet, kind: Kind = kind) -> Any:
            near, light = meet([part[i] for part in kind.shape], origin, rays)
            is_nearer = near < best[0]
            painted = tuple(jnp.where(is_nearer, kind.paint[i, channel], old) for channel, old in enumerate(best[2]))
            return jnp.where(is_nearer, near, best[0]), jnp.where(is_nearer, light, best[1]), painted

        found = jax.lax.fori_loop(0, kind.count, nearer, found)
    distance, light, paint = found
    return paint, light, _along(origin, rays, distance - LIFT)


def _signs_before(kinds: Sequence[Kind], origin: V, rays: V) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """How far away the sign is that a ray meets, whatever is before it, or FAR; and its paint."""
    signs, none = kinds[len(MEET)], jnp.full(rays.x.shape, FAR)

    def before(i: jax.Array, best: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        near, _ = _meet_ball([part[i] for part in signs.shape], origin, rays)
        paint = tuple(jnp.where(near < FAR, signs.paint[i, channel], old) for channel, old in enumerate(best[1]))
        return jnp.where(near < FAR, near, best[0]), paint

    found = (none, (none,) * signs.paint.shape[1])
    return jax.lax.fori_loop(0, signs.count, before, found) if signs.paint.size else found


def _ground(place: V, is_ground: jax.Array) -> tuple[jax.Array, ...]:
    """The colours of the table, of what is around it, and of the wall behind all."""
    (left, right), (near, far) = TABLE
    inside = jnp.minimum(jnp.minimum(place.x - left, right - place.x), jnp.minimum(place.y - near, far - place.y))
    tones = (SHADE * place.y, 0.0, SHADE * place.x)
    return tuple(
        jnp.where(~is_ground, wall, jnp.where(inside > RIM, table + tone, jnp.where(inside > 0, rim, floor)))
        for tone, table, rim, floor, wall in zip(tones, *(COLOURS[name] for name in ("table", "rim", "floor", "wall")), strict=True)
    )


def _in_shadow(kinds: Sequence[Kind], place: V) -> jax.Array:
    shadow = jnp.zeros(place.x.shape, bool)
    for meet, kind in _some(kinds):

        def darker(i: jax.Array, dark: jax.Array, meet: Callable = meet, kind: Kind = kind) -> jax.Array:
            return dark | (meet([part[i] for part in kind.shape], place, TO_SUN)[0] < FAR)

        shadow = jax.lax.fori_loop(0, kind.count, darker, shadow)
    return shadow


# --- shapes --------------------------------------------------------------------------------------------------------------
# Each function gives the distance at which a ray enters a shape from outside, or FAR, and the cosine between the surface there and the
# sun. Either origins or directions may be those of all rays.


def _coloured(shapes: Shapes) -> list[Kind]:
    return _kinds(shapes, (shapes.box_colour, shapes.ball_colour, shapes.rod_colour, shapes.drum_colour, shapes.sign_colour))


def _kinds(shapes: Shapes, paints: Sequence[jax.Array]) -> list[Kind]:
    """In the order of MEET, and signs."""
    kinds = (
        ((shapes.box_centre, shapes.box_rotation, shapes.box_half), jnp.min(shapes.box_half, axis=1, initial=jnp.inf)),
        ((shapes.ball_centre, shapes.ball_radius), shapes.ball_radius),
        ((shapes.rod_start, shapes.rod_end, shapes.rod_radius), shapes.rod_radius),
        ((shapes.drum_centre, shapes.drum_radius, shapes.drum_half), jnp.minimum(shapes.drum_radius, shapes.drum_half)),
        ((shapes.sign_centre, shapes.sign_radius), shapes.sign_radius),
    )
    made = []
    for (shape, size), paint in zip(kinds, paints, strict=True):
        order = jnp.argsort(size <= 0, stable=True)
        ordered = [jnp.asarray(part)[order] for part in (*shape, paint)]
        made.append(Kind(tuple(ordered[:-1]), ordered[-1], jnp.sum(size > 0, dtype=jnp.int32)))
    return made


def _some(kinds: Sequence[Kind]) -> list[tuple[Callable, Kind]]:
    """Without signs, and those that no scene has."""
    return [(meet, kind) for meet, kind in zip(MEET, kinds[: len(MEET)], strict=True) if kind.paint.size]


def _meet_box(box: Sequence[jax.Array], origin: V, ray: V) -> tuple[jax.Array, jax.Array]:
    centre, rotation, half = box
    origin = _minus(origin, _vector(centre))
    enters, leaves, lights = [], [], []
    for i in range(3):
        axis = _vector(rotation[:, i])
        inverse = 1 / _not_zero(_dot(axis, ray))
        middle, reach = -_dot(axis, origin) * inverse, jnp.abs(inverse) * half[i]
        enters.append(middle - reach)
        leaves.append(middle + reach)
        lights.append(-jnp.sign(inverse) * _dot(axis, TO_SUN))
    enter = jnp.maximum(jnp.maximum(enters[0], enters[1]), enters[2])
    leave = jnp.minimum(jnp.minimum(leaves[0], leaves[1]), leaves[2])
    light = jnp.where(enter == enters[0], lights[0], jnp.where(enter == enters[1], lights[1], lights[2]))
    return jnp.where((enter < leave) & (enter > 0), enter, FAR), light


def _meet_ball(ball: Sequence[jax.Array], origin: V, ray: V) -> tuple[jax.Array, jax.Array]:
    centre, radius = ball
    return _enter_ball(_minus(origin, _vector(centre)), radius, ray)


def _enter_ball(origin: V, radius: jax.Array, ray: V) -> tuple[jax.Array, jax.Array]:
    """Of a ball about zero."""
    nearest = -_dot(origin, ray)
    off = _along(origin, ray, nearest)
    room = radius * radius - _dot(off, off)
    enter = nearest - jnp.sqrt(jnp.maximum(room, 0))
    light = _dot(_along(origin, ray, enter), TO_SUN) / jnp.maximum(radius, TINY)
    return jnp.where((room > 0) & (enter > 0), enter, FAR), light


def _meet_rod(rod: Sequence[jax.Array], origin: V, ray: V) -> tuple[jax.Array, jax.Array]:
    """A ray that enters the endless rod between the ends enters there; any other, through the ball of the end it is beyond."""
    start, end, radius = rod
    length = jnp.sqrt(jnp.sum((end - start) ** 2))
    axis = _vector((end - start) / jnp.maximum(length, TINY))
    origin = _minus(origin, _vector(start))
    rise, height = _dot(ray, axis), _dot(origin, axis)
    across, off = _along(ray, axis, -rise), _along(origin, axis, -height)
    speed = jnp.maximum(_dot(across, across), TINY)
    nearest = -_dot(across, off) / speed
    passing = _along(off, across, nearest)
    room = radius * radius - _dot(passing, passing)
    enter = nearest - jnp.sqrt(jnp.maximum(room, 0) / speed)
    along = height + enter * rise
    on_axis = jnp.clip(along, 0, length)
    from_axis = _along(origin, axis, -on_axis)
    at_end, light_of_end = _enter_ball(from_axis, radius, ray)
    is_between = along == on_axis
    light = jnp.where(is_between, _dot(_along(from_axis, ray, enter), TO_SUN) / jnp.maximum(radius, TINY), light_of_end)
    return jnp.where((room > 0) & is_between, jnp.where(enter > 0, enter, FAR), jnp.where(is_between, FAR, at_end)), light


def _meet_drum(drum: Sequence[jax.Array], origin: V, ray: V) -> tuple[jax.Array, jax.Array]:
    centre, radius, half = drum
    origin = _minus(origin, _vector(centre))
    speed = jnp.maximum(ray.x * ray.x + ray.y * ray.y, TINY)
    aside = origin.x * ray.y - origin.y * ray.x
    room = radius * radius * speed - aside * aside
    nearest, reach = -(origin.x * ray.x + origin.y * ray.y) / speed, jnp.sqrt(jnp.maximum(room, 0)) / speed
    inverse = 1 / _not_zero(ray.z)
    lid, floor = -origin.z * inverse - jnp.abs(inverse) * half, -origin.z * inverse + jnp.abs(inverse) * half
    enter, leave = jnp.maximum(nearest - reach, lid), jnp.minimum(nearest + reach, floor)
    place = _along(origin, ray, enter)
    side = (place.x * TO_SUN.x + place.y * TO_SUN.y) / jnp.maximum(radius, TINY)
    light = jnp.where(enter == lid, -jnp.sign(inverse) * TO_SUN.z, side)
    return jnp.where((room > 0) & (enter < leave) & (enter > 0), enter, FAR), light


MEET = (_meet_box, _meet_ball, _meet_rod, _meet_drum)


# --- vectors -------------------------------------------------------------------------------------------------------------


def _vector(array: jax.Array) -> V:
    return V(array[0], array[1], array[2])


def _dot(a: V, b: V) -> jax.Array:
    return a.x * b.x + a.y * b.y + a.z * b.z


def _minus(a: V, b: V) -> V:
    return V(a.x - b.x, a.y - b.y, a.z - b.z)


def _along(start: V, direction: V, distance: jax.Array) -> V:
    return V(start.x + distance * direction.x, start.y + distance * direction.y, start.z + distance * direction.z)


def _not_zero(number: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(number) < TINY, TINY, number)


def _unit(vector: Any, numpy: Any = jnp) -> Any:
    return vector / numpy.sqrt(numpy.sum(vector * vector))
