"""Films of episodes: what both cameras saw, as moving pictures, and a sheet that shows an episode of each cell at a glance."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image, ImageDraw, ImageFont

from blm_jax.data.files import write_whole
from blm_jax.evaluate.world import tasks
from blm_jax.evaluate.world.arms import ROBOTS
from blm_jax.evaluate.world.runs import rollout
from blm_jax.evaluate.world.runs.cells import Episodes
from blm_jax.evaluate.world.runs.frames import drawn
from blm_jax.evaluate.world.scene import HZ, Setting, State
from blm_jax.evaluate.world.tasks import TASKS
from blm_jax.evaluate.world.view import SIZE, tiled

EVERY = 2  # steps between frames
AFTER = 6  # steps that are shown of what comes after the end
SECONDS = 1.0  # for which the last frame stays
LARGER = 2  # times
COLOURS = 256  # of a film: as many as its format has
SHEET, AT_A_GLANCE = "films.png", 6  # frames of an episode on the sheet
LABEL, LETTERS = 124, 13  # pixels of the sheet's first column, and of its letters
GOOD, BAD = (30, 110, 60), (170, 50, 40)  # of what the sheet says


class Take(NamedTuple):
    """Episodes as they were done, a row each."""

    settings: Setting  # [rows, ...]
    states: State  # [rows, steps + 1, ...]
    held: np.ndarray  # [rows] int32 steps for which the task's rule had held in the end


def take_of(settings: Setting, traces: Sequence[rollout.Trace], at: rollout.Progress) -> Take:
    """Of a whole batch, to all processes: what its turns began with and `traces` tell, and where they have led."""
    settings, parts, last, held = multihost_utils.process_allgather(
        (settings, [one.state for one in traces], at.state, at.held), tiled=True
    )
    last = jax.tree.map(lambda x: x[:, None], last)
    return Take(settings, jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *parts, last), held)


class Films:
    """DIRECTORY/films/ROBOT_TASK_NUMBER.gif, and the sheet beside them."""

    def __init__(self, directory: epath.Path):
        self.directory, self.sheet = directory, directory / SHEET
        self._strips: dict[tuple[str, str], np.ndarray] = {}  # by robot and task

    def path(self, robot: str, task: str, number: int) -> epath.Path:
        return self.directory / "films" / f"{robot}_{task}_{number}.gif"

    def missing(self, episodes: Episodes) -> np.ndarray:
        """[episodes] bool: which are still to be filmed. The sheet is made of the first of each cell."""
        sheet = self.sheet.exists()
        rows = zip(*(part.tolist() for part in episodes), strict=True)
        return np.array(
            [not self.path(ROBOTS[robot], TASKS[task], number).exists() or (number == 0 and not sheet) for robot, task, number in rows]
        )

    def write(self, take: Take, told: Sequence[Mapping[str, Any]]) -> None:
        """`told` says of the first rows which episode each is and how it went."""
        steps = [np.arange(0, end_of(one, int(take.held[row])) + 1, EVERY) for row, one in enumerate(told)]
        rows, places = np.repeat(np.arange(len(told)), [len(some) for some in steps]), np.concatenate(steps)
        pictures = drawn(jax.tree.map(lambda x: x[rows], take.settings), jax.tree.map(lambda x: x[rows, places], take.states))
        for one, frames in zip(told, np.split(pictures, np.cumsum([len(some) for some in steps])[:-1]), strict=True):
            write_whole(self.path(one["robot"], one["task"], one["episode"]), as_gif(frames))
            if one["episode"] == 0:
                self._strips[one["robot"], one["task"]] = _strip(one, frames[:, 0])

    def finish(self) -> None:
        """After the last episode."""
        if self._strips and not self.sheet.exists():
            contents = io.BytesIO()
            Image.fromarray(tiled([[strip] for strip in self._strips.values()])).save(contents, "PNG", optimize=True)
            write_whole(self.sheet, contents.getvalue())


def end_of(told: Mapping[str, Any], held: int) -> int:
    """The last step that is shown: a little after the rule has held long enough, or the very last of an episode that failed."""
    limit = tasks.LIMITS[TASKS.index(told["task"])]
    return min(limit, limit - held + rollout.HELD + AFTER) if told["success"] else limit


def as_gif(frames: np.ndarray) -> bytes:
    """[frames, cameras, height, width, 3] uint8, cameras side by side."""
    pixels, palette = _indexed(np.stack([tiled(frame[None]) for frame in frames]))
    images = [Image.fromarray(image) for image in pixels.repeat(LARGER, axis=1).repeat(LARGER, axis=2)]
    for image in images:
        image.putpalette(palette.tobytes())
    first, *rest = images
    milliseconds = [round(1000 * EVERY / HZ)] * len(rest) + [round(1000 * SECONDS)]
    contents = io.BytesIO()
    first.save(contents, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return contents.getvalue()


def _indexed(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., 3] uint8 -> places in a palette [...] uint8, and the palette. One for a whole film, or what stands still would flicker."""
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8, found], axis=-1).astype(np.uint8)  # [colours, 3]
    palette = colours
    if len(colours) > COLOURS:
        # What is often seen stays as it is; then comes what is least like all before it, or a small cube's would be lost among greys.
        chosen = list(np.argsort(-counts, kind="stable")[: COLOURS // 4])
        values = colours.astype(np.float32)
        apart = np.min([((values - values[one]) ** 2).sum(axis=1) for one in chosen], axis=0)  # [colours] from the nearest that is chosen
        while len(chosen) < COLOURS:
            chosen.append(apart.argmax())
            apart = np.minimum(apart, ((values - values[chosen[-1]]) ** 2).sum(axis=1))
        palette = colours[chosen]
    wanted, given = colours.astype(np.float32), palette.astype(np.float32)
    apart = (given**2).sum(axis=1) - 2 * wanted @ given.T  # [colours, palette] squared distances, but for what is the same in a row
    return apart.argmin(axis=1).astype(np.uint8)[places].reshape(packed.shape), palette


def _strip(told: Mapping[str, Any], frames: np.ndarray) -> np.ndarray:
    """Frames [frames, height, width, 3] that are evenly spread, behind the words of which episode they are."""
    label = Image.new("RGB", (LABEL, SIZE), "white")
    words, font = ImageDraw.Draw(label), ImageFont.load_default(LETTERS)
    words.text((4, SIZE / 4), f"{told['robot']}\n{told['task']}", "black", font)
    words.text((4, SIZE * 3 / 5), *(("succeeded", GOOD) if told["success"] else ("failed", BAD)), font)
    evenly = np.linspace(0, len(frames) - 1, AT_A_GLANCE).round().astype(int)
    return np.concatenate([np.asarray(label), tiled(frames[evenly][None])], axis=1)
