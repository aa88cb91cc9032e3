"""Pictures against another road: rays marched by signed distances, in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.evaluate.world import render
from blm_jax.evaluate.world.render import AMBIENT, COLOURS, SAMPLES, SHADE, SUN, TO_SUN, WRAP, Camera
from blm_jax.evaluate.world.scene import Shapes

SIZE = 40
SCENES = 4
CAMERA = Camera(
    np.array([0.9, -0.3, 0.6], np.float32), np.array([0, 0.05, 0.1], np.float32), np.array([0, 0, 1], np.float32), np.float32(0.75)
)
SUNWARD = np.array(TO_SUN, np.float64)


def random_scene(seed: int, boxes: int = 3, balls: int = 3, rods: int = 3, drums: int = 2, signs: int = 2) -> Shapes:
    random = np.random.default_rng(seed)

    def places(count: int) -> np.ndarray:
        return random.uniform((-0.25, -0.25, 0.02), (0.25, 0.25, 0.3), (count, 3))

    def sizes(*form: int) -> np.ndarray:
        return random.uniform(0.02, 0.07, form)

    def tints(count: int) -> np.ndarray:
        return random.uniform(0, 1, (count, 3))

    turned = np.linalg.qr(random.normal(size=(boxes, 3, 3)))[0]
    given = (
        *(places(boxes), turned, sizes(boxes, 3), tints(boxes)),
        *(places(balls), sizes(balls), tints(balls)),
        *(places(rods), places(rods), sizes(rods), tints(rods)),
        *(places(drums), sizes(drums), sizes(drums), tints(drums)),
        *(places(signs), sizes(signs), tints(signs)),
    )
    return Shapes(*(f32(array) for array in given))


@functools.cache
def scenes() -> Shapes:
    """Several, one of them with shapes that lie in one another, and one with rods of no length."""
    made = [random_scene(seed) for seed in range(SCENES)]
    made[1] = made[1]._replace(rod_end=made[1].rod_start)
    made[2] = made[2]._replace(ball_centre=made[2].box_centre)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


def scene(i: int) -> Shapes:
    return jax.tree.map(lambda leaf: leaf[i], scenes())


@functools.cache
def seen() -> tuple[np.ndarray, np.ndarray]:
    numbers, distances = jax.jit(jax.vmap(lambda shapes: render.first_seen(shapes, CAMERA, SIZE)))(scenes())
    return np.asarray(numbers), np.asarray(distances)


@functools.cache
def pictured() -> np.ndarray:
    return np.asarray(jax.jit(lambda shapes: render.pictures(shapes, CAMERA, SIZE))(scenes()))


# --- the oracle ----------------------------------------------------------------------------------------------------------


def pinhole(sample: tuple[float, float]) -> np.ndarray:
    """Directions [SIZE, SIZE, 3] of the rays of one sample (down, along), by the inverse of a projection matrix."""
    ahead = f64(CAMERA.target) - f64(CAMERA.position)
    backward = -ahead / np.linalg.norm(ahead)
    right = np.cross(f64(CAMERA.up), backward)
    right /= np.linalg.norm(right)
    to_world = np.stack([right, np.cross(backward, right), backward], axis=1)
    focal = SIZE / (2 * np.tan(float(CAMERA.field) / 2))
    matrix = np.array([[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]])
    down, along = np.meshgrid(np.arange(SIZE) + sample[0], np.arange(SIZE) + sample[1], indexing="ij")
    in_camera = np.stack([along, down, np.ones_like(down)], axis=-1) @ np.linalg.inv(matrix).T * np.array([1, -1, -1])
    rays = in_camera @ to_world.T
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def distances(shapes: Shapes, points: np.ndarray) -> np.ndarray:
    """Signed distances [..., shapes] of points [..., 3]."""
    found = []
    for centre, rotation, half in zip(shapes.box_centre, shapes.box_rotation, shapes.box_half, strict=True):
        beyond = np.abs((points - centre) @ f64(rotation)) - half
        found.append(np.linalg.norm(np.maximum(beyond, 0), axis=-1) + np.minimum(beyond.max(-1), 0))
    for centre, radius in zip(shapes.ball_centre, shapes.ball_radius, strict=True):
        found.append(np.linalg.norm(points - centre, axis=-1) - radius)
    for start, end, radius in zip(shapes.rod_start, shapes.rod_end, shapes.rod_radius, strict=True):
        line = f64(end) - start
        part = np.clip((points - start) @ line / max(line @ line, 1e-12), 0, 1)
        found.append(np.linalg.norm(points - start - part[..., None] * line, axis=-1) - radius)
    for centre, radius, half in zip(shapes.drum_centre, shapes.drum_radius, shapes.drum_half, strict=True):
        off = points - centre
        beyond = np.stack([np.linalg.norm(off[..., :2], axis=-1) - radius, np.abs(off[..., 2]) - half], axis=-1)
        found.append(np.linalg.norm(np.maximum(beyond, 0), axis=-1) + np.minimum(beyond.max(-1), 0))
    return np.stack(found, axis=-1)


def march(shapes: Shapes, start: np.ndarray, rays: np.ndarray, floor: bool) -> tuple[np.ndarray, np.ndarray]:
    """What each ray meets, -1 for the floor or nothing, and how far away."""
    far, gone = np.full(rays.shape[:-1], np.inf), np.zeros(rays.shape[:-1])
    if floor:
        far = np.where(rays[..., 2] < 0, -start[..., 2] / np.minimum(rays[..., 2], -1e-12), np.inf)
    for _ in range(100):
        room = distances(shapes, start + gone[..., None] * rays).min(-1)
        gone = np.where((room > 1e-7) & (gone < np.minimum(far, 5)), gone + room, gone)
    shape = distances(shapes, start + gone[..., None] * rays)
    hit = (shape.min(-1) < 1e-4) & (gone < far)
    return np.where(hit, shape.argmin(-1), -1), np.where(hit, gone, far)


def signs_before(shapes: Shapes, start: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of signs alone: which one is in front, the last one where there are more, -1 for none; and how far away it begins."""
    number, far = np.full(rays.shape[:-1], -1), np.full(rays.shape[:-1], np.inf)
    for i, (centre, radius) in enumerate(zip(shapes.sign_centre, shapes.sign_radius, strict=True)):
        along = (f64(centre) - start) @ np.moveaxis(rays, -1, -2)
        room = float(radius) ** 2 - np.sum((f64(centre) - start - along[..., None] * rays) ** 2, axis=-1)
        number, far = np.where(room > 0, i, number), np.where(room > 0, along - np.sqrt(np.maximum(room, 0)), far)
    return number, far


def away_from_edges(numbers: np.ndarray) -> np.ndarray:
    """Pixels whose neighbours show the same."""
    padded = np.pad(numbers, 1, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return (windows == numbers[..., None, None]).all((-1, -2))


# --- tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(SCENES))
def test_rays_meet_what_marching_meets(i: int) -> None:
    numbers, far = march(scene(i), f64(CAMERA.position), pinhole(SAMPLES[0]), floor=True)
    sign, sign_far = signs_before(scene(i), f64(CAMERA.position), pinhole(SAMPLES[0]))
    others = distances(scene(i), np.zeros(3)).shape[-1]
    numbers, far = np.where(sign >= 0, others + sign, numbers), np.where(sign >= 0, sign_far, far)
    ours, our_far = seen()[0][i], seen()[1][i]
    assert len(np.unique(numbers)) > 5 and (sign >= 0).sum() > 8
    inner = away_from_edges(numbers)
    assert inner.mean() > 0.5
    np.testing.assert_array_equal(ours[inner], numbers[inner])
    assert (ours != numbers).mean() < 0.005
    near = inner & np.isfinite(far) & (far < 5)
    np.testing.assert_allclose(our_far[near], far[near], atol=5e-5)


@pytest.mark.parametrize("i", range(SCENES))
def test_the_table_is_dark_where_the_way_to_the_sun_is_barred(i: int) -> None:
    start = f64(CAMERA.position)
    dark, seen_so, table = [], [], np.ones((SIZE, SIZE), bool)
    for sample in SAMPLES:
        rays = pinhole(sample)
        numbers, far = march(scene(i), start, rays, floor=True)
        place = start + far[..., None] * rays
        nothing = (numbers < 0) & (signs_before(scene(i), start, rays)[0] < 0)
        on_table = nothing & (np.abs(place[..., :2]) < 0.5).all(-1)
        table &= on_table
        shaded, _ = march(scene(i), np.where(on_table[..., None], place, 9), np.broadcast_to(SUNWARD, rays.shape), floor=False)
        dark.append(shaded >= 0)
        level = AMBIENT + WRAP * SUNWARD[2] + SUN * SUNWARD[2] * (shaded < 0)
        tone = np.array(COLOURS["table"]) + SHADE * place[..., [1, 0, 0]] * [1, 0, 0] + SHADE * place[..., [0, 0, 0]] * [0, 0, 1]
        seen_so.append(np.clip(tone * level[..., None], 0, 1))
    expected = 255 * np.mean(seen_so, axis=0)
    wrong = np.abs(pictured()[i].astype(int) - expected).max(-1) > 1
    assert 0.02 < np.mean(dark, axis=0)[table].mean() < 0.9
    assert wrong[table].mean() < 0.01


def test_a_face_is_as_bright_as_its_angle_to_the_sun_says() -> None:
    box = empty()._replace(
        box_centre=f32([[0, 0, 0.1]]), box_rotation=f32([np.eye(3)]), box_half=f32([[0.1, 0.1, 0.1]]), box_colour=f32([[0.5, 0.5, 0.5]])
    )
    picture = np.asarray(render.picture(box, CAMERA, SIZE))
    for middle, normal in (([0, 0, 0.2], 2), ([0.1, 0, 0.1], 0)):
        (column, row), _ = render.project(CAMERA, f32(middle), SIZE)
        expected = 255 * 0.5 * (AMBIENT + (WRAP + SUN) * SUNWARD[normal])
        assert picture[int(row), int(column)] == pytest.approx(np.full(3, expected), abs=0.51)


def test_a_sign_is_its_colour_whatever_is_before_it_and_casts_no_shadow() -> None:
    hidden = empty()._replace(
        box_centre=f32([[0.1, 0, 0.15]]), box_rotation=f32([np.eye(3)]), box_half=f32([[0.1, 0.2, 0.15]]), box_colour=f32([[0.5, 0.5, 0.5]])
    )
    signed = hidden._replace(sign_centre=f32([[0, 0, 0.1]]), sign_radius=f32([0.05]), sign_colour=f32([[0.2, 0.8, 0.4]]))
    without, picture = (np.asarray(render.picture(shapes, CAMERA, SIZE)).astype(int) for shapes in (hidden, signed))
    (column, row), _ = render.project(CAMERA, f32([0, 0, 0.1]), SIZE)
    np.testing.assert_array_equal(picture[int(row), int(column)], [51, 204, 102])
    rows, columns = np.nonzero((picture != without).any(-1))
    assert np.hypot(rows + 0.5 - row, columns + 0.5 - column).max() < 4 < len(rows) < 50


def test_points_are_seen_where_they_project_to() -> None:
    """By homogeneous coordinates, and by the pixels that a small ball fills."""
    points = np.random.default_rng(0).uniform(-0.2, 0.2, (5, 3)).astype(np.float32) + f32([0, 0, 0.25])
    rays = points - f64(CAMERA.position)
    grid = pinhole((0.0, 0.0)).reshape(-1, 3)
    for project in (np.asarray, jnp.asarray):
        places, ahead = (np.asarray(array) for array in render.project(CAMERA, project(points), SIZE))
        for place, ray, depth in zip(places, rays, ahead, strict=True):
            nearest = np.argmax(grid @ ray)
            assert np.abs(np.array([nearest % SIZE, nearest // SIZE]) - place).max() <= 0.51
            middle = pinhole((0.0, 0.0))[SIZE // 2, SIZE // 2]
            assert depth == pytest.approx(ray @ middle, abs=1e-5)
    see = jax.jit(lambda shapes: render.first_seen(shapes, CAMERA, SIZE)[0])
    for point, place in zip(points, places, strict=True):
        ball = empty()._replace(ball_centre=point[None], ball_radius=f32([0.04]), ball_colour=f32([[1, 0, 0]]))
        rows, columns = np.nonzero(np.asarray(see(ball)) == 0)
        found = np.array([columns.mean() + SAMPLES[0][1], rows.mean() + SAMPLES[0][0]])
        np.testing.assert_allclose(found, place, atol=0.3)


def test_what_has_no_size_is_not_seen() -> None:
    plain, ghosts = scene(0), scene(3)
    ghosts = ghosts._replace(
        box_half=0 * ghosts.box_half,
        ball_radius=0 * ghosts.ball_radius,
        rod_radius=0 * ghosts.rod_radius,
        drum_radius=0 * ghosts.drum_radius,
        sign_radius=0 * ghosts.sign_radius,
    )
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), plain, ghosts)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda shapes: render.picture(shapes, CAMERA, SIZE))(both)), pictured()[0])


def test_a_picture_is_the_same_alone_and_among_others() -> None:
    """And whether its camera is a constant of the program or not."""
    alone = jax.jit(lambda shapes, camera: render.picture(shapes, camera, SIZE))
    for i in range(SCENES):
        np.testing.assert_array_equal(np.asarray(alone(scene(i), CAMERA)), pictured()[i])


def f32(numbers: Any) -> Any:
    return np.asarray(numbers, np.float32)


def f64(numbers: Any) -> np.ndarray:
    return np.asarray(numbers, np.float64)


def empty() -> Shapes:
    return random_scene(0, 0, 0, 0, 0, 0)
