"""LeRobot's formats against sets that lerobot wrote and what it read back; broken sets; what we write against what it writes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from PIL import Image

from blm_jax.data.demos import lerobot, lerobot_writer
from blm_jax.data.demos.episodes import BadEpisode
from blm_jax.data.demos.lerobot import LeRobot
from blm_jax.data.demos.recorder import Recorder
from blm_jax.data.demos.robots import Camera, Robot
from blm_jax.data.demos.survey import survey
from blm_jax.errors import RequestError, RunError
from tests.data.demos.recordings import ARM, FIXTURES, SMALL, copied, record, write

SETS = ("lerobot_v21", "lerobot_v30")
NUMBERS = ("observation.state", "action")
LENGTHS = (12, 10)


def opened(path: Path) -> LeRobot:
    return LeRobot(epath.Path(path))


@pytest.mark.parametrize("name", SETS)
def test_reads_what_lerobot_reads(name: str) -> None:
    source, reference = opened(FIXTURES / name), np.load(FIXTURES / f"{name}.npz")
    assert (source.count, source.hz, source.texts) == (2, 20.0, ("task",))
    assert {key: source.columns[key] for key in NUMBERS} == dict.fromkeys(NUMBERS, 7)
    assert source.cameras == {f"observation.images.{camera}": (64, 64) for camera in ("front", "wrist")}
    for episode, length in enumerate(LENGTHS):
        rows = slice(12 * episode, 12 * episode + length)
        found = source.read(episode, NUMBERS, "task")
        assert found.actions == length and found.instructions == reference["task"][rows].tolist()
        for column in NUMBERS:
            np.testing.assert_array_equal(found.values[column], reference[column][rows])
        for camera in ("front", "wrist"):
            source.check_frames(episode, f"observation.images.{camera}")
            frames = source.frames(episode, f"observation.images.{camera}", range(length)).astype(int)
            apart = np.abs(frames[:, None] - reference[camera][rows][None].astype(int)).max(axis=(2, 3, 4))  # [ours, theirs]
            assert np.diag(apart).max() <= 2  # decoders may round colours differently
            assert (apart + 255 * np.eye(length)).min() > 50  # and no frame is taken for its neighbour


@pytest.mark.parametrize("name", SETS)
def test_frames_come_in_the_order_they_are_asked_for(name: str) -> None:
    source = opened(FIXTURES / name)
    whole = source.frames(1, "observation.images.wrist", range(10))
    np.testing.assert_array_equal(source.frames(1, "observation.images.wrist", [9, 0, 3, 3]), whole[[9, 0, 3, 3]])


def test_v20_differs_in_its_statistics_alone(tmp_path: Path) -> None:
    path = copied("lerobot_v21", tmp_path)
    (path / "meta" / "episodes_stats.jsonl").unlink()
    edit_info(path, codebase_version="v2.0")
    np.testing.assert_array_equal(
        opened(path).read(1, ["action"], "task").values["action"], np.load(f"{FIXTURES}/lerobot_v21.npz")["action"][12:]
    )


def test_rows_are_found_however_a_file_groups_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("lerobot_v30", tmp_path)
    file = next(path.glob("data/*/*.parquet"))
    table = pq.read_table(file)
    wanted = opened(path).read(1, NUMBERS, "task").values
    for size in (1, 5, 100):
        pq.write_table(table, file, row_group_size=size)
        for kept in (0, 2**29):
            monkeypatch.setattr(lerobot, "KEPT", kept)
            found = opened(path).read(1, NUMBERS, "task").values
            for column in NUMBERS:
                np.testing.assert_array_equal(found[column], wanted[column])


def test_identity_is_of_tasks_and_of_where_videos_lie(tmp_path: Path) -> None:
    found = {opened(FIXTURES / name).identity for name in SETS}
    found |= {opened(copied(name, tmp_path)).identity for name in SETS}
    assert len(found) == 2  # wherever they lie
    file = tmp_path / "lerobot_v21/meta/tasks.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | {"task": "another"}), *rest]))
    found.add(opened(tmp_path / "lerobot_v21").identity)
    edit_rows(tmp_path / "lerobot_v30", EPISODES, put("videos/observation.images.front/from_timestamp", 1, 0.55))
    found.add(opened(tmp_path / "lerobot_v30").identity)
    assert len(found) == 4


def test_kept_rows_are_counted_with_what_they_point_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot, "KEPT", 2**20)
    kept = lerobot._Kept()
    pictures = [lerobot._numpy(pa.array([{"bytes": bytes(100_000), "path": "x"}] * 4), "front") for _ in range(5)]
    for i, values in enumerate(pictures):
        kept.put(i, values)
    assert list(kept.held) == [3, 4] and 800_000 < kept.size < 810_000
    kept.put(3, np.zeros(100))  # takes the place of what it replaces
    assert 400_000 < kept.size < 410_000 and list(kept.held) == [4, 3]
    kept.put(5, lerobot._numpy(pa.array(["x" * 700_000]), "task"))
    assert list(kept.held) == [3, 5] and 700_000 < kept.size < 710_000


def test_threads_keep_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot, "KEPT", 4000)
    kept, interval = lerobot._Kept(), sys.getswitchinterval()

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 9, 4000).tolist():
            values = kept.get(number)
            assert values is None or len(values) in (100, 101)
            kept.put(number, np.zeros(100 + seed % 2))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert kept.size == sum(values.nbytes for values, _ in kept.held.values()) <= 4000


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_another_size_than_promised_are_the_sets_fault(workers: int, tmp_path: Path) -> None:
    """The first episode is bad: the next one shows it."""
    path = copied("lerobot_v21", tmp_path)
    (path / "data/chunk-000/episode_000000.parquet").unlink()
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"]["shape"] = [48, 64, 3]
    (path / "meta/info.json").write_text(json.dumps(info))
    robot = replace(ARM, cameras=(Camera("front", 64, 64), Camera("wrist", 48, 64)))
    with pytest.raises(RequestError) as caught:
        survey([path], robot, workers=workers)
    says = "pictures observation.images.wrist of episode 1 are 64x64 (height x width), camera wrist is 48x64"
    assert str(path) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_within_parquet(tmp_path: Path) -> None:
    """A set of lerobot's that was made without videos."""
    path = copied("lerobot_v30", tmp_path)
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["observation.images.front"]["dtype"] = "image"
    (path / "meta/info.json").write_text(json.dumps(info))
    file = next(path.glob("data/*/*.parquet"))
    table = pq.read_table(file)
    pictures = np.random.default_rng(0).integers(0, 256, (len(table), 64, 64, 3), np.uint8)
    cells = []
    for picture in pictures:
        contents = io.BytesIO()
        Image.fromarray(picture).save(contents, "PNG")
        cells.append({"bytes": contents.getvalue(), "path": "x.png"})
    pq.write_table(table.append_column("observation.images.front", pa.array(cells)), file)
    source = opened(path)
    source.check_frames(1, "observation.images.front")
    np.testing.assert_array_equal(source.frames(1, "observation.images.front", [3, 0]), pictures[[15, 12]])
    cells[14]["bytes"] = None
    pq.write_table(table.append_column("observation.images.front", pa.array(cells)), file)
    with pytest.raises(BadEpisode, match="lacks pictures"):
        opened(path).check_frames(1, "observation.images.front")


@pytest.mark.parametrize("options", [{"bf": "2", "g": "12"}, {"bf": "0", "g": "250"}])
def test_videos_whose_frames_lean_on_others(options: dict[str, str], tmp_path: Path) -> None:
    """As other tools write them: few key frames, and frames that are not stored in the order in which they are shown."""
    path = copied("lerobot_v30", tmp_path)
    file = next(path.glob("videos/*front/*/*"))
    with av.open(str(file), mode="r") as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("libx264", rate=20, options=options)
        stream.width = stream.height = 64
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(file), mode="r") as container:
        wanted = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    source = opened(path)
    source.check_frames(1, "observation.images.front")
    np.testing.assert_array_equal(source.frames(1, "observation.images.front", [7, 2, 9]), [wanted[12 + step] for step in (7, 2, 9)])
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(BadEpisode, match="cannot be read"):
        source.check_frames(1, "observation.images.front")


# --- what is broken --------------------------------------------------------------------------------------------------------------


def edit_info(path: Path, **changes: Any) -> None:
    info = json.loads((path / "meta/info.json").read_text())
    for key, value in changes.items():
        info.pop(key) if value is None else info.update({key: value})
    (path / "meta/info.json").write_text(json.dumps(info))


def edit_rows(path: Path, pattern: str, change: Callable[[dict[str, list[Any]]], Any]) -> None:
    file = next(path.glob(pattern))
    table = pq.read_table(file)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), file)


def put(column: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[column][row] = value

    return change


DATA, EPISODES = "data/*/*.parquet", "meta/episodes/*/*.parquet"
REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no JSON": ("lerobot_v30", lambda path: (path / "meta/info.json").write_text("{"), "cannot be read as JSON"),
    "version": ("lerobot_v30", lambda path: edit_info(path, codebase_version="v1.6"), "format v1.6; v2.0, v2.1, v3.0 are read"),
    "no version": ("lerobot_v30", lambda path: edit_info(path, codebase_version=None), "codebase_version is missing: it must be text"),
    "no features": ("lerobot_v30", lambda path: edit_info(path, features=None), "features is missing"),
    "features": ("lerobot_v30", lambda path: edit_info(path, features={"action": 3}), "feature action has no dtype and shape"),
    "fps text": ("lerobot_v30", lambda path: edit_info(path, fps="20"), "fps is '20': it must be a number"),
    "fps 0": ("lerobot_v30", lambda path: edit_info(path, fps=0), "fps is 0.0: it must be above 0"),
    "count": ("lerobot_v30", lambda path: edit_info(path, total_episodes=3), "promises 3 episodes, but 2 are listed"),
    "chunks": ("lerobot_v21", lambda path: edit_info(path, chunks_size=0), "chunks_size is 0"),
    "escape": ("lerobot_v30", lambda path: edit_info(path, data_path="../{chunk_index}/{file_index}.parquet"), "out of the set"),
    "absolute": ("lerobot_v30", lambda path: edit_info(path, video_path="/etc/{video_key}"), "out of the set"),
    "attribute": (
        "lerobot_v30",
        lambda path: edit_info(path, data_path="{chunk_index.__class__}"),
        "must be made of chunk_index, file_index",
    ),
    "key": ("lerobot_v21", lambda path: edit_info(path, data_path="{file}.parquet"), "must be made of episode_chunk, episode_index"),
    "wide": ("lerobot_v30", lambda path: edit_info(path, data_path="{chunk_index:0999999999d}"), "must be made of"),
    "brace": ("lerobot_v30", lambda path: edit_info(path, data_path="{chunk_index"), "is no template"),
    "no tasks": ("lerobot_v30", lambda path: (path / "meta/tasks.parquet").unlink(), "does not exist"),
    "no task lines": ("lerobot_v21", lambda path: (path / "meta/tasks.jsonl").unlink(), "cannot be read as JSON lines"),
    "task lines": ("lerobot_v21", lambda path: (path / "meta/tasks.jsonl").write_text("[1]\n"), "tasks.jsonl:1 must hold a JSON object"),
    "task index": ("lerobot_v21", lambda path: (path / "meta/tasks.jsonl").write_text('{"task": "x"}\n'), "task_index is missing"),
    "no episodes": ("lerobot_v30", lambda path: shutil.rmtree(path / "meta/episodes"), "holds no Parquet file"),
    "no parquet": ("lerobot_v30", lambda path: next(path.glob(EPISODES)).write_bytes(b"PAR1"), "cannot be read as Parquet"),
    "column": ("lerobot_v30", lambda path: edit_rows(path, EPISODES, lambda rows: rows.pop("length")), "has no column length"),
    "length": ("lerobot_v30", lambda path: edit_rows(path, EPISODES, put("length", 0, -1)), "length is -1: it counts from 0"),
    "null": ("lerobot_v30", lambda path: edit_rows(path, EPISODES, put("data/file_index", 1, None)), "data/file_index is missing"),
    "twice": ("lerobot_v30", lambda path: edit_rows(path, EPISODES, put("episode_index", 1, 0)), "lists its episode 0 twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sets_that_are_refused(case: str, tmp_path: Path) -> None:
    name, spoil, says = REFUSED[case]
    path = copied(name, tmp_path)
    spoil(path)
    with pytest.raises(RequestError) as caught:
        opened(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def cut(path: Path, pattern: str, share: float) -> None:
    file = next(path.glob(pattern))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


VIDEO = "videos/**/*.mp4"
BAD: dict[str, tuple[str, Callable[[Path], Any], str, int]] = {  # the last: the first of two episodes that is good, 2 for none
    "nan": (
        "lerobot_v30",
        lambda path: edit_rows(path, DATA, put("action", 3, [0.0] * 6 + [float("nan")])),
        "action gripper is nan at step 3",
        1,
    ),
    "null": ("lerobot_v30", lambda path: edit_rows(path, DATA, put("action", 3, None)), "different lengths", 2),
    "ragged": ("lerobot_v30", lambda path: edit_rows(path, DATA, put("action", 3, [0.0])), "different lengths", 2),
    "huge": (
        "lerobot_v30",
        lambda path: edit_rows(path, DATA, put("observation.state", 0, [1e300] * 7)),
        "state joint1 is 1e+300 at step 0",
        1,
    ),
    "texts": (
        "lerobot_v30",
        lambda path: edit_rows(path, DATA, lambda rows: rows.update(action=["x"] * 22)),
        "column action holds no numbers",
        2,
    ),
    "no column": ("lerobot_v30", lambda path: edit_rows(path, DATA, lambda rows: rows.pop("action")), "it has no column action", 2),
    "short": ("lerobot_v30", lambda path: edit_rows(path, EPISODES, put("length", 0, 13)), "holds 12 of its 13 steps", 1),
    "empty": ("lerobot_v30", lambda path: edit_rows(path, EPISODES, put("length", 0, 0)), "it has no steps", 1),
    "mixed": ("lerobot_v30", lambda path: edit_rows(path, DATA, put("episode_index", 3, 1)), "do not follow each other", 2),
    "no task": ("lerobot_v30", lambda path: edit_rows(path, DATA, put("task_index", 3, 7)), "task 7 is not in the list", 1),
    "no data": (
        "lerobot_v21",
        lambda path: (path / "data/chunk-000/episode_000000.parquet").unlink(),
        "episode_000000.parquet is missing",
        1,
    ),
    "cut data": ("lerobot_v21", lambda path: cut(path, "data/chunk-000/episode_000000.parquet", 0.5), "cannot be read", 1),
    "no video": (
        "lerobot_v21",
        lambda path: (path / "videos/chunk-000/observation.images.wrist/episode_000000.mp4").unlink(),
        "is missing",
        1,
    ),
    "cut video": ("lerobot_v30", lambda path: cut(path, VIDEO, 0.7), "cannot be read", 2),
    "no bytes": ("lerobot_v30", lambda path: cut(path, VIDEO, 0), "cannot be read", 2),
    "times": ("lerobot_v30", lambda path: edit_rows(path, DATA, put("timestamp", 3, 0.16)), "it has no frame at 0.1600 s", 1),
    "no time": ("lerobot_v30", lambda path: edit_rows(path, DATA, put("timestamp", 3, None)), "it has no frame at nan s", 1),
}


@pytest.mark.parametrize("case", BAD)
def test_episodes_that_are_bad(case: str, tmp_path: Path) -> None:
    name, spoil, says, first_good = BAD[case]
    path = copied(name, tmp_path)
    spoil(path)
    if first_good == 2:
        with pytest.raises(RequestError) as caught:
            survey([path], ARM)
        reason = str(caught.value)
        assert "no episode can be used; episode 0" in reason
    else:
        (found,) = survey([path], ARM).sets
        assert list(found.bad) == [0] and found.actions == (0, 10)
        reason = found.bad[0]
    assert says in reason and "\n" not in reason


@pytest.mark.parametrize("name", SETS)
def test_damage_anywhere_is_reported(name: str, tmp_path: Path) -> None:
    """Bytes of any file are changed, or its end is cut off: what comes is a survey or an error of ours."""
    rng = np.random.default_rng(0)
    path = copied(name, tmp_path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for turn in range(40):
        file = files[turn % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 20):
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged if turn % 3 else whole[: rng.integers(0, len(whole))])
        try:
            found = survey([path], ARM)
            assert sum(count > 0 for count in found.sets[0].actions) + len(found.sets[0].bad) == 2
        except (RequestError, RunError) as error:
            assert "\n" not in str(error)
        file.write_bytes(whole)
    assert not survey([path], ARM).sets[0].bad


# --- writing ---------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_laid_out_as_lerobot_does(tmp_path: Path) -> None:
    write(tmp_path / "ours", ARM, list(LENGTHS), "lerobot")
    theirs = FIXTURES / "lerobot_v30"
    found, wanted = (json.loads((path / "meta/info.json").read_text()) for path in (tmp_path / "ours", theirs))
    for feature in wanted["features"].values():
        if "info" in feature:
            feature["info"]["video.codec"] = "h264"
    assert found == wanted | {"total_tasks": 2}
    assert names(tmp_path / "ours") == names(theirs)
    for pattern in (DATA, EPISODES):
        ours, lerobots = (pq.read_schema(next(path.glob(pattern))) for path in (tmp_path / "ours", theirs))
        kept = [field for field in lerobots if not field.name.startswith("stats/")]
        assert {field.name: field.type for field in ours} == {field.name: field.type for field in kept}
    stats, theirs_stats = (json.loads((path / "meta/stats.json").read_text()) for path in (tmp_path / "ours", theirs))
    for column in NUMBERS:
        assert stats[column].keys() == theirs_stats[column].keys()


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("frames", [1, 15, 20_000])
def test_what_is_written_is_read_back(frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_writer, "FRAMES", frames)
    recordings = write(tmp_path / "ours", SMALL, [9, 7, 5], "lerobot", last=False)
    assert len(list(tmp_path.glob("ours/data/*/*"))) == {1: 3, 15: 2, 20_000: 1}[frames]
    source = opened(tmp_path / "ours")
    for episode, recording in enumerate(recordings):
        found = source.read(episode, NUMBERS, "task")
        np.testing.assert_array_equal(found.values["observation.state"], recording.state)
        np.testing.assert_array_equal(found.values["action"], recording.action)
        assert found.instructions == [f"do {episode}"] * len(recording.action)
        pictures = source.frames(episode, "observation.images.base", range(len(recording.action)))
        assert np.abs(pictures.astype(int) - recording.images["base"]).max() <= 6
    stats = json.loads((tmp_path / "ours/meta/stats.json").read_text())["action"]
    actions = np.concatenate([recording.action for recording in recordings]).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], actions.mean(axis=0))
    np.testing.assert_allclose(stats["std"], actions.std(axis=0))


@pytest.mark.parametrize(
    ("robot", "says"),
    [
        (replace(SMALL, hz=12.5), "12.5 steps a second, and LeRobot's sets a whole number"),
        (replace(SMALL, cameras=(Camera("base", 15, 24),)), "camera base is 15x24, and videos have even sizes"),
    ],
)
def test_robots_that_lerobot_has_no_place_for(robot: Robot, says: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=says):
        Recorder(tmp_path / "new", robot, "lerobot")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "new", robot, [4], "rlds")
    assert survey([tmp_path / "new"], robot).windows == 4


@pytest.mark.parametrize("form", ["rlds", "lerobot"])
def test_a_set_appears_whole_or_not_at_all(form: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path / "new", SMALL, form) as recorder:
        recorder.add(record(SMALL, 5))
        assert not (tmp_path / "new").exists()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="there is no episode"), Recorder(tmp_path / "new", SMALL, form):
        pass
    assert not list(tmp_path.iterdir())
    with Recorder(tmp_path / "new", SMALL, form) as recorder:
        good = record(SMALL, 5)
        for spoiled, says in (
            (replace(good, images={}), "the pictures of camera base are missing"),
            (replace(good, action=good.action[:3]), "6 observations and 3 actions"),
            (replace(good, state=good.state * np.nan), "not finite"),
            (replace(good, action=np.full(good.action.shape, 1e39)), "not finite in float32"),
            (replace(good, instruction=" "), "no instruction"),
        ):
            with pytest.raises(RequestError, match=says):
                recorder.add(spoiled)
        recorder.add(record(SMALL, 5))
    assert survey([tmp_path / "new"], SMALL).windows == 5
    with pytest.raises(RequestError, match="exists"):
        Recorder(tmp_path / "new", SMALL, form)
