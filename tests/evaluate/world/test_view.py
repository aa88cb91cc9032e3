"""What the cameras show of the tasks."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blm_jax.evaluate.world import arms, render, tasks, view
from blm_jax.evaluate.world.contact import BIN_BLOCK
from blm_jax.evaluate.world.scene import BODIES, Setting, State

EACH = 4  # beginnings of each robot's each task


@functools.cache
def beginnings() -> tuple[Setting, State]:
    robots, wanted = np.meshgrid(np.arange(len(arms.ROBOTS)), np.arange(len(tasks.TASKS)), indexing="ij")
    robots, wanted = robots.ravel().repeat(EACH), wanted.ravel().repeat(EACH)
    made = jax.jit(jax.vmap(tasks.reset))(jax.random.split(jax.random.key(3), len(robots)), robots, wanted)
    return jax.tree.map(np.asarray, made)


@functools.cache
def shapes() -> Any:
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(view.shapes))(*beginnings()))


@functools.cache
def seen() -> np.ndarray:
    """Which shape is at each pixel [beginnings, cameras, size, size]."""
    cameras = jax.tree.map(lambda *leaves: np.stack(leaves), *view.CAMERAS.values())
    look = jax.vmap(lambda scene, camera: render.first_seen(scene, camera, view.SIZE)[0], (None, 0))
    # Without LLVM's optimiser, rays take ten times as long.
    options = {"xla_backend_optimization_level": 1}
    return np.asarray(jax.jit(lambda scenes: jax.lax.map(lambda scene: look(scene, cameras), scenes), compiler_options=options)(shapes()))


def test_every_body_is_seen_well_by_one_camera_at_least() -> None:
    setting, _ = beginnings()
    numbers = view.numbers(jax.tree.map(lambda leaf: leaf[0], shapes()))
    for i in range(BODIES):
        there = setting.kind[:, i] != 0
        count = np.isin(seen()[there], numbers[f"body {i}"]).sum((-1, -2)).max(-1)
        assert there.sum() >= 4 * EACH
        assert (count >= 12).mean() >= 0.99
    targets = setting.goal_seen & ((setting.task == tasks.PUSH) | (setting.task == tasks.PULL))
    assert (np.isin(seen()[targets], numbers["goal"]).sum((-1, -2)) >= 100).all()
    signs = setting.goal_seen & (setting.task == tasks.PICK)
    assert signs.any() and (np.isin(seen()[signs], numbers["goal"]).sum((-1, -2)) >= 12).all()  # by every camera


def test_all_that_tasks_lay_out_is_within_the_pictures() -> None:
    def corners(x: float, y: float, z: float, at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
        return np.array(list(itertools.product((-x, x), (-y, y), (0, z))), np.float32) + np.array(at, np.float32)

    both = [corners(0.1, 0.1, 0.32), corners(0.12, 0.23, 0.05), corners(0.05, 0.05, 0.22, (0.065, 0, 0)), corners(0.3, 0.1, 0.04)]
    stacks = {"front": corners(0.2, 0.265, 0.04), "side": corners(0.22, 0.32, 0.04)}  # the first cuts off the outermost
    for name, camera in view.CAMERAS.items():
        for points in (*both, stacks[name]):
            places, _ = render.project(camera, points, view.SIZE)
            assert places.min() >= 0 and places.max() <= view.SIZE


@pytest.mark.parametrize(("axis", "least", "mean"), [(0, 1.5, 1.55), (1, 1.35, 1.5), (2, 1.25, 1.4)])
def test_a_centimetre_is_more_than_a_pixel(axis: int, least: float, mean: float) -> None:
    points = np.array(list(itertools.product((-0.25, 0, 0.1), (-0.1, 0, 0.1), (0.02, 0.1))), np.float32)
    ways = []
    for camera in view.CAMERAS.values():
        before, _ = render.project(camera, points, view.SIZE)
        after, _ = render.project(camera, points + 0.01 * np.eye(3, dtype=np.float32)[axis], view.SIZE)
        ways.append(np.linalg.norm(after - before, axis=-1))
    best = np.max(ways, axis=0)
    assert best.min() >= least and best.mean() >= mean


def test_pads_close_about_the_tool() -> None:
    setting, state = beginnings()
    at = slice(0, None, 7)
    setting, state = (jax.tree.map(lambda leaf: leaf[at], part) for part in (setting, state))
    forward = jax.jit(jax.vmap(arms.forward))(setting.arm, setting.base, state.joints)[1]
    shaped = jax.jit(jax.vmap(view.shapes))
    for opening in (0.0, 0.4, 1.0):
        made = shaped(setting, state._replace(opening=np.full_like(state.opening, opening)))
        for i in range(len(state.opening)):
            tool, arm = np.asarray(forward[i]), jax.tree.map(lambda leaf, i=i: leaf[i], setting.arm)
            in_tool = (np.asarray(made.box_centre[i, :3]) - tool[:3, 3]) @ tool[:3, :3]
            palm, left, right = in_tool
            gap = right[1] - left[1] - 2 * arm.pad[1]
            assert gap == pytest.approx(opening * arm.stroke, abs=1e-6)
            assert left[2] + arm.pad[2] == pytest.approx(0, abs=1e-6)  # tips
            assert palm[2] + arm.palm[2] == pytest.approx(left[2] - arm.pad[2], abs=1e-6)


def test_links_join_and_robots_have_colours_of_their_own() -> None:
    made, (setting, _) = shapes(), beginnings()
    np.testing.assert_allclose(made.rod_start[:, 1:], made.rod_end[:, :-1], atol=1e-6)
    np.testing.assert_allclose(made.rod_start[:, 0], setting.base, atol=1e-6)
    np.testing.assert_allclose(made.rod_end[:, -1], made.box_centre[:, 0], atol=1e-6)
    robots = np.arange(len(arms.ROBOTS)).repeat(len(tasks.TASKS) * EACH)
    np.testing.assert_allclose(made.rod_colour[:, 0], arms.TABLE["colour"][robots])


def test_the_bin_and_goals_are_shown_where_there_are_some() -> None:
    made, (setting, _) = shapes(), beginnings()
    bins = made.box_half[:, 3 + BODIES :].max((1, 2))
    assert ((bins > 0) == (setting.task == tasks.PLACE)).all()
    first = np.flatnonzero(setting.has_bin)[0]
    corners = np.abs(made.box_centre[first, 3 + BODIES :] - setting.bin[first]) + made.box_half[first, 3 + BODIES :]
    np.testing.assert_allclose(corners.max(0)[:2], BIN_BLOCK[:2], atol=1e-6)
    assert ((made.sign_radius[:, 0] > 0) == (setting.task == tasks.PICK)).all()
    assert ((made.drum_radius[:, 1] > 0) == np.isin(setting.task, (tasks.PUSH, tasks.PULL))).all()


def test_both_cameras_in_one_program() -> None:
    few = jax.tree.map(lambda leaf: jnp.asarray(leaf[:2]), shapes())
    both = np.asarray(jax.jit(lambda scenes: view.pictures(scenes, 32))(few))
    assert both.shape == (2, len(view.CAMERAS), 32, 32, 3)
    alone = jax.jit(lambda scene: render.picture(scene, view.CAMERAS["side"], 32))(jax.tree.map(lambda leaf: leaf[1], few))
    np.testing.assert_array_equal(both[1, 1], np.asarray(alone))
    assert view.tiled(both).shape == (2 * 34 - 2, 2 * 34 - 2, 3)
