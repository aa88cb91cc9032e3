"""RLDS against tensorflow-datasets' own reading and writing, in both kinds of files; broken sets."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image
from tensorflow_datasets.core import dataset_info
from tensorflow_datasets.proto import tf_example_pb2

from blm_jax.data.demos.demonstrations import open_demonstrations
from blm_jax.data.demos.episodes import BadEpisode
from blm_jax.data.demos.recorder import Recorder
from blm_jax.data.demos.rlds import Rlds
from blm_jax.data.demos.robots import Column, Columns
from blm_jax.data.demos.sets import open_set, read_episode
from blm_jax.data.demos.survey import survey
from blm_jax.errors import RequestError, RunError
from tests.data.demos.recordings import SMALL, record, write

LENGTHS = [6, 1, 9]
# A set of somebody else's: columns of its own, JPEG, the instruction among the observations.
THEIRS = replace(
    SMALL,
    columns=Columns(
        state=(Column("observation.joints", (2,)), Column("observation.grip", scale=0.01)),
        action=(Column("action.target", (1, 0)),),
        cameras={"base": "observation.image"},
        instruction="observation.natural_language_instruction",
    ),
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "set" / "2.1.0"
    path.mkdir(parents=True)
    features = tfds.features
    observation = {
        "joints": features.Tensor(shape=(3,), dtype=np.float64),
        "grip": features.Scalar(np.int32),
        "image": features.Image(shape=(16, 24, 3), encoding_format="png"),
        "natural_language_instruction": features.Text(),
    }
    step = {
        "observation": observation,
        "action": {"target": features.Tensor(shape=(2,), dtype=np.float32)},
        "is_last": features.Scalar(np.bool_),
    }
    tree = features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": {"file": features.Text()}})
    identity = dataset_info.DatasetIdentity("theirs", tfds.core.Version("2.1.0"), str(path), module_name="")
    writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=tree), 2, file_format="array_record")  # type: ignore[arg-type]
    writer.initialize_splits(["train"])
    rng = np.random.default_rng(0)
    for episode in range(3):
        steps = [
            {
                "observation": {
                    "joints": rng.uniform(-3, 3, 3),
                    "grip": int(rng.integers(0, 101)),
                    "image": rng.integers(0, 256, (16, 24, 3), np.uint8),
                    "natural_language_instruction": f"put {episode} away",
                },
                "action": {"target": rng.uniform(0, 1, 2).astype(np.float32)},
                "is_last": i == 4,
            }
            for i in range(5)
        ]
        for one in steps:
            one["observation"]["image"] = _png(one["observation"]["image"])
        writer.add_examples({"train": [{"steps": steps, "episode_metadata": {"file": "x"}}]})
    writer.close_all()
    return path


def _png(picture: np.ndarray) -> bytes:
    contents = io.BytesIO()
    Image.fromarray(picture).save(contents, "PNG")
    return contents.getvalue()


def as_tfrecord(path: Path, out: Path) -> Path:
    """The same set in TFRecord files. Checksums are left at 0: they are not looked at."""
    out.mkdir(parents=True)
    for file in path.iterdir():
        name = file.name.replace("array_record", "tfrecord")
        if "array_record" not in file.name:
            text = file.read_text().replace('"array_record"', '"tfrecord"').replace("{FILEFORMAT}", "tfrecord")
            (out / name).write_text(text)
            continue
        reader = ArrayRecordReader(str(file))
        records = reader.read_all()
        (out / name).write_bytes(b"".join(struct.pack("<QI", len(one), 0) + one + bytes(4) for one in records))
    return out


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
@pytest.mark.parametrize("place", ["version", "above"])
def test_reads_what_tensorflow_datasets_reads(form: str, place: str, theirs: Path, tmp_path: Path) -> None:
    path = theirs if form == "array_record" else as_tfrecord(theirs, tmp_path / "set" / "2.1.0")
    source = open_set(path if place == "version" else path.parent)
    builder: Any = tfds.builder_from_directory(str(theirs))
    wanted = builder.as_data_source("train")
    assert source.count == len(wanted) == 3 and source.hz is None
    for number in range(3):
        steps = list(wanted[number]["steps"])
        found = read_episode(source, THEIRS, number)
        state = [[one["observation"]["joints"][2], 0.01 * one["observation"]["grip"]] for one in steps]
        np.testing.assert_array_equal(found.state, state)
        np.testing.assert_array_equal(found.action, [one["action"]["target"][::-1] for one in steps[:-1]])  # the last was not taken
        assert found.instructions == [one["observation"]["natural_language_instruction"].decode() for one in steps]
        source.check_frames(number, "observation.image")
        np.testing.assert_array_equal(
            source.frames(number, "observation.image", [4, 0]), [steps[4]["observation"]["image"], steps[0]["observation"]["image"]]
        )


def test_what_is_written_tensorflow_datasets_reads(tmp_path: Path) -> None:
    recordings = write(tmp_path / "ours", SMALL, LENGTHS)
    builder: Any = tfds.builder_from_directory(str(tmp_path / "ours"))
    read = builder.as_data_source("train")
    assert len(read) == 3 and builder.info.metadata == {"hz": 10.0, "robot": "small"}
    for recording, episode in zip(recordings, read, strict=True):
        steps = list(episode["steps"])
        assert [one["is_first"] for one in steps] == [True] + [False] * len(recording.action)
        assert [one["is_last"] for one in steps] == [False] * len(recording.action) + [True]
        for i, one in enumerate(steps):
            np.testing.assert_array_equal(one["observation"]["state"], recording.state[i])
            np.testing.assert_array_equal(one["observation"]["images"]["base"], recording.images["base"][i])
            assert one["language_instruction"].decode() == recording.instruction
            if i < len(recording.action):
                np.testing.assert_array_equal(one["action"], recording.action[i])


def test_the_same_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    """Proto's maps have no order of their own: each process would write another, and its runs another order of moments."""
    write(tmp_path / "ours", SMALL, LENGTHS)
    example: Any = tf_example_pb2  # whose classes are made when it is imported
    (shard,) = (tmp_path / "ours").glob("*.array_record*")
    reader = ArrayRecordReader(str(shard))
    records = [reader.read([number])[0] for number in range(reader.num_records())]
    assert len(records) == len(LENGTHS)
    for written in records:
        assert example.Example.FromString(written).SerializeToString(deterministic=True) == written


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    recordings = write(tmp_path / "ours", SMALL, LENGTHS)
    source = open_set(tmp_path / "ours")
    assert (source.count, source.hz, source.cameras) == (3, 10.0, {"observation.images.base": (16, 24)})
    for number, recording in enumerate(recordings):
        found = read_episode(source, SMALL, number)
        np.testing.assert_array_equal(found.state, recording.state)
        np.testing.assert_array_equal(found.action, recording.action)
        np.testing.assert_array_equal(source.frames(number, "observation.images.base", [0]), recording.images["base"][:1])


# --- what is broken --------------------------------------------------------------------------------------------------------------


def edit(path: Path, name: str, old: str, new: str) -> None:
    text = (path / name).read_text()
    assert old in text
    (path / name).write_text(text.replace(old, new))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda path: (path / "dataset_info.json").write_text("{"), "cannot be opened as an RLDS data set"),
    "no features": (lambda path: (path / "features.json").unlink(), "features.json cannot be read"),
    "no steps": (lambda path: edit(path, "features.json", '"steps"', '"stages"'), "cannot be opened as an RLDS data set"),
    "format": (
        lambda path: edit(path, "dataset_info.json", '"array_record"', '"riegeli"'),
        "is stored as riegeli: array_record and tfrecord",
    ),
    "split": (lambda path: edit(path, "dataset_info.json", '"train"', '""'), "cannot be opened"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sets_that_are_refused(case: str, tmp_path: Path) -> None:
    spoil, says = REFUSED[case]
    write(tmp_path / "ours", SMALL, [3])
    spoil(tmp_path / "ours")
    with pytest.raises(RequestError) as caught:
        open_set(tmp_path / "ours")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_several_versions_are_a_question(tmp_path: Path) -> None:
    for version in ("1.0.0", "1.0.1"):
        write(tmp_path / "set" / version, SMALL, [3])
    with pytest.raises(RequestError, match=r"several data sets: name one of 1.0.0, 1.0.1"):
        open_set(tmp_path / "set")
    with pytest.raises(RequestError, match="holds neither"):
        open_set(tmp_path / "set" / "..")


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_files_that_break_off(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm_jax.data.demos.rlds.SHARD", 1)
    write(tmp_path / "ours", SMALL, LENGTHS)
    path = tmp_path / "ours" if form == "array_record" else as_tfrecord(tmp_path / "ours", tmp_path / "set")
    files = sorted(path.glob("*-train*"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-30])
    files[1].unlink()
    (found,) = survey([path], SMALL).sets
    assert found.actions == (0, 0, 9) and sorted(found.bad) == [0, 1]
    assert "breaks off" in found.bad[0] or "cannot be read" in found.bad[0]
    assert found.bad[1] == f"{files[1].name} is missing"


def test_episodes_that_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm_jax.data.demos.recorder.check_recording", lambda *_: None)
    good = record(SMALL, 4)
    action = good.action.copy()
    action[2, 1] = np.inf
    with Recorder(tmp_path / "ours", SMALL) as recorder:
        for one in (
            replace(good, action=action),
            replace(good, instruction=" "),
            replace(good, state=good.state[:1], action=good.action[:0]),
            good,
        ):
            recorder.add(one)
    found = survey([tmp_path / "ours"], SMALL)
    assert found.sets[0].actions == (0, 0, 0, 4)
    assert found.sets[0].bad == {0: "action gripper is inf at step 2", 1: "it has no instruction at step 0", 2: "it has no action"}
    assert len(open_demonstrations(tmp_path / "ours", SMALL, found)) == 4


def test_a_picture_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "ours", SMALL, [4, 4])
    found = survey([tmp_path / "ours"], SMALL)
    demonstrations = open_demonstrations(tmp_path / "ours", SMALL, found)
    pictures = Rlds(epath.Path(tmp_path / "ours"))._steps(1)["observation"]["images"]["base"]
    pictures[2] = b"no picture"
    with pytest.raises(BadEpisode, match="cannot be read"):
        demonstrations.source.frames(1, "observation.images.base", [2])
    with pytest.raises(RunError, match=r"ours, episode 1: a picture of observation.images.base cannot be read"):
        demonstrations.window(6)
    pictures[1] = b""
    with pytest.raises(BadEpisode, match="of step 1 is missing"):
        demonstrations.source.check_frames(1, "observation.images.base")


def test_damage_anywhere_is_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path / "ours", SMALL, [4, 5])
    files = sorted(file for file in (tmp_path / "ours").iterdir())
    for turn in range(24):
        file = files[turn % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 10):
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged if turn % 3 else whole[: rng.integers(0, len(whole))])
        try:
            assert len(survey([tmp_path / "ours"], SMALL).sets[0].actions) > 0
        except (RequestError, RunError) as error:
            assert "\n" not in str(error)
        file.write_bytes(whole)
    assert json.loads((tmp_path / "ours/metadata.json").read_text())["hz"] == 10
