"""The flows of both stages where paths lie in buckets: what comes out is what comes out of a disk, and commit markers are written last."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from blm_jax.data import command
from blm_jax.data.corpora.packed import PackedRows, open_packed
from blm_jax.data.demos import intents as store
from blm_jax.data.demos.demonstrations import Demonstrations, open_demonstrations
from blm_jax.data.demos.intents import open_intents
from blm_jax.data.demos.moments import Augmentation
from blm_jax.data.demos.recorder import Form, Recorder
from blm_jax.data.demos.robots import Robot
from blm_jax.data.demos.sets import open_set
from blm_jax.data.demos.survey import read_survey, survey, write_survey
from blm_jax.data.loader import Loader
from blm_jax.errors import RequestError, RunError
from tests.data.bucket import ROOT, Bucket, upload, use
from tests.data.corpora.material import open_engine, write_source
from tests.data.corpora.test_packed import arrays, same
from tests.data.demos.recordings import ARM, SMALL, write
from tests.data.demos.stage_two import Stage, make_stage, write_intents
from tests.data.demos.test_rlds import as_tfrecord


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    return use(monkeypatch, tmp_path / "home")


# --- Stage I ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), 20)


def test_a_corpus_in_a_bucket_is_that_of_a_disk(bucket: Bucket, source: Path, model_files: Path, tmp_path: Path) -> None:
    engine = functools.partial(open_engine, str(model_files))

    def opened(out: str, plans: str) -> PackedRows:
        told = command.prepare(str(source), engine, out, workers=0, records_per_shard=8)
        assert told["records"] == 20
        return open_packed({out: 1}, engine, length=1024, batch=2, plans=plans)

    there, here = opened(f"{ROOT}/corpus", f"{ROOT}/plans"), opened(str(tmp_path / "corpus"), str(tmp_path / "plans"))
    loader = Loader(there)
    for step in range(6):
        wanted = [arrays(here.read(step, row)) for row in range(2)]
        assert all(np.array_equal(x, np.concatenate(y)) for x, y in zip(arrays(next(loader)), zip(*wanted, strict=True), strict=True))
    loader.close()
    worker = pickle.loads(pickle.dumps(there))
    assert same(worker.read(0, 1), here.read(0, 1)) and os.path.isdir(worker.sequences.directory)  # plans are fetched once for all

    made = [name for name in bucket.written if not name.startswith("plan-")]
    assert made[0] == "preparing.json" and made[-1] == "corpus.json"
    on_disk = {path.name for path in (tmp_path / "corpus").iterdir()}
    assert {name.rpartition("/")[2] for name in bucket.objects if name.startswith("bucket/corpus/")} == on_disk
    for path in (tmp_path / "plans").iterdir():  # the loader has read on, over the ends of more epochs
        assert bucket.objects[f"bucket/plans/{path.name}"] == path.read_bytes()
    again = open_packed({f"{ROOT}/corpus": 1}, engine, length=1024, batch=2, plans=f"{ROOT}/plans")
    assert same(again.read(1, 1), here.read(1, 1)) and len(bucket.written) == len(set(bucket.written))


def test_preparing_into_a_bucket_goes_on(bucket: Bucket, source: Path, model_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, out = functools.partial(open_engine, str(model_files)), f"{ROOT}/corpus"
    with monkeypatch.context() as patch:
        patch.setattr("blm_jax.data.corpora.prepare._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.prepare(str(source), engine, out, workers=0, records_per_shard=8)
    with pytest.raises(RequestError, match="is not finished: run the same"):
        open_packed({out: 1}, engine, length=1024, batch=2)
    before = len(bucket.written)
    assert command.prepare(str(source), engine, out, workers=0, records_per_shard=8)["records"] == 20
    assert bucket.written[before:] == ["report.jsonl", "lengths.npy", "corpus.json"]
    bucket.full = True
    with pytest.raises(RequestError, match=r"preparing\.json cannot be written: No space left on device"):
        command.prepare(str(source), engine, f"{ROOT}/other", workers=0, records_per_shard=8)


# --- Stage II --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "robot"), [("lerobot", ARM), ("tfrecord", SMALL)])
def test_sets_in_a_bucket_are_those_of_a_disk(form: Form | str, robot: Robot, bucket: Bucket, tmp_path: Path) -> None:
    here = tmp_path / "set"
    write(here, robot, [5, 2, 9], "lerobot" if form == "lerobot" else "rlds")
    if form == "tfrecord":
        here = as_tfrecord(here, tmp_path / "tfrecord")
    there = upload(bucket, here, "set")
    found, wanted = survey([there], robot), survey([here], robot)
    assert (found.statistics, found.sets[0].identity, found.windows) == (wanted.statistics, wanted.sets[0].identity, 16)
    write_survey(f"{ROOT}/{robot.name}.json", found)
    assert bucket.written == [f"{robot.name}.json"]
    with pytest.raises(RequestError, match="exists"):
        write_survey(f"{ROOT}/{robot.name}.json", found)
    read = read_survey(f"{ROOT}/{robot.name}.json", robot)
    assert read == found

    def opened(path: Path | str) -> Demonstrations:
        return open_demonstrations(path, robot, read, [camera.name for camera in robot.cameras])

    for index in (0, 6, 15):
        one, other = opened(there).window(index), opened(here).window(index)
        assert one.observation.instruction == other.observation.instruction
        np.testing.assert_array_equal(one.actions, other.actions)
        for pictures, known in ((dict(one.observation.images), dict(other.observation.images)), (one.future, other.future)):
            assert list(pictures) == list(known) and all(np.array_equal(pictures[name], known[name]) for name in known)
    broken = upload(bucket, here, "broken")  # elsewhere: what lies in a bucket is taken not to change
    del bucket.objects[next(name for name in bucket.objects if "/broken/" in name and (".mp4" in name or "tfrecord-00000" in name))]
    with pytest.raises(RequestError, match=r"no episode can be used; episode 0: .* is missing"):
        survey([broken], robot)


def test_what_a_bucket_is_not_good_for_is_said(bucket: Bucket, tmp_path: Path) -> None:
    write(tmp_path / "set", SMALL, [3], "rlds")
    there = upload(bucket, tmp_path / "set", "set")
    with pytest.raises(RequestError, match="lies in a bucket, from which ArrayRecord files are not read: copy the set to a disk"):
        open_set(there)
    with pytest.raises(RequestError, match="is no directory of demonstrations"):
        open_set(f"{ROOT}/none")
    with pytest.raises(RequestError, match="lies in a bucket: record to a disk"):
        Recorder(f"{ROOT}/new", SMALL)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Stage:
    return make_stage(tmp_path_factory.mktemp("sets"), model_files)


def test_intents_in_a_bucket_are_those_of_a_disk(bucket: Bucket, stage: Stage, tmp_path: Path) -> None:
    there = write_intents(f"{ROOT}/intents", stage, SMALL, Augmentation())
    here = write_intents(tmp_path / "intents", stage, SMALL, Augmentation())
    assert bucket.written[0] == store.MAKING and bucket.written[-1] == store.INFO
    assert {name.rpartition("/")[2] for name in bucket.objects} == {path.name for path in (tmp_path / "intents").iterdir()}
    assert there.plan == here.plan
    for number in range(here.plan.frames):
        version, which, episode, step = here.plan.locate(number)
        for one, other in zip(there.frame(which, episode, step, version), here.frame(which, episode, step, version), strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(there.numbers(0, 2), here.numbers(0, 2), strict=True):
        np.testing.assert_array_equal(one, other)

    shard = next(name for name in bucket.objects if name.endswith("00001.bin"))
    bucket.objects[shard] = bucket.objects[shard][:-4]
    with pytest.raises(RunError, match=r"hidden-00001.bin is damaged: it holds .* bytes; make it again"):
        [there.frame(0, *here.plan.locate(number)[2:], 0) for number in here.plan.shard(1)]
    del bucket.objects["bucket/intents/intents.json"]
    with pytest.raises(RequestError, match="holds no intents"):
        open_intents(f"{ROOT}/intents")
