"""Demonstrations as RLDS: data sets of tensorflow-datasets with nested steps, in ArrayRecord or TFRecord files, read without TensorFlow.

Columns are named by their way from the step, as in observation.state. The action of an episode's last step was not taken, or
led to nothing that was recorded: it is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from PIL import Image

from blm_jax.data.demos.episodes import BadEpisode, Recording, Rows, Source, Stamp, marks, stamp
from blm_jax.data.demos.robots import Robot
from blm_jax.data.files import one_line, read_json, read_text
from blm_jax.errors import RequestError

INFO = "dataset_info.json"
FORMS = ("array_record", "tfrecord")
FRAME = struct.Struct("<QI")  # of a TFRecord: length and its checksum; behind the contents stands theirs
CHECKSUM = 4
HZ = "hz"  # where our own sets say how many steps a second has
SHARD = 64  # episodes a file
INSTRUCTION = "language_instruction"


def rlds_directory(path: epath.Path) -> epath.Path | None:
    """Where a set lies: at this path, or in the one version below it."""
    if (path / INFO).exists():
        return path
    below = [child for child in path.iterdir() if (child / INFO).exists()]
    if len(below) > 1:
        names = ", ".join(sorted(child.name for child in below))
        raise RequestError(f"{path} holds several data sets: name one of {names}")
    return below[0] if below else None


class Rlds(Source):
    """A set on disk. See `episodes.Source`."""

    def __init__(self, path: epath.Path):
        self.path = path
        described = [read_text(path / name) for name in (INFO, "features.json")]
        self._described = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        try:
            builder = _builder(os.fspath(path), self._described)
            info = builder.info
            self._form = str(getattr(info.file_format, "value", info.file_format))
            splits = {name: (list(map(os.fspath, split.filepaths)), list(split.shard_lengths)) for name, split in info.splits.items()}
            steps = info.features["steps"]
            flat = _flat(steps.feature)
        except Exception as error:  # it raises many kinds, with explanations of many lines
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RequestError(f"{path} cannot be opened as an RLDS data set: {said:.300}") from error
        if self._form not in FORMS:
            raise RequestError(f"{path} is stored as {self._form}: {' and '.join(FORMS)} are read")
        if self._form == "array_record" and "://" in os.fspath(path):
            raise RequestError(f"{path} lies in a bucket, from which ArrayRecord files are not read: copy the set to a disk")
        split = "train" if "train" in splits else next(iter(splits), "")
        if not split or (split != "train" and len(splits) > 1):
            raise RequestError(f"{path} has the splits {', '.join(splits) or 'none'} and no train: which one to take is not known")
        files, lengths = splits[split]
        if len(files) != len(lengths):
            raise RequestError(f"{path / INFO} lists {len(files)} files and {len(lengths)} lengths")
        self._files = tuple(files)
        self._starts = np.cumsum([0, *lengths])
        self.count = int(self._starts[-1])
        self._sort(flat)
        metadata = read_json(path / "metadata.json") if (path / "metadata.json").exists() else {}
        hz = metadata.get(HZ)
        self.hz = float(hz) if isinstance(hz, (int, float)) and not isinstance(hz, bool) and 0 < hz < math.inf else None

    @cached_property
    def identity(self) -> str:
        files = {place.name: place for place in map(epath.Path, self._files)}
        return hashlib.sha256(json.dumps([self._described, marks(files)]).encode()).hexdigest()

    def _sort(self, features: Mapping[str, Any]) -> None:
        import tensorflow_datasets as tfds

        columns: dict[str, int] = {}
        cameras: dict[str, tuple[int | None, int | None]] = {}
        texts = []
        for name, feature in features.items():
            shape: Any = getattr(feature, "shape", None)
            if isinstance(feature, tfds.features.Image):
                cameras[name] = shape[0], shape[1]
            elif isinstance(feature, tfds.features.Text) or (shape == () and np.dtype(feature.np_dtype).kind in "OSU"):
                texts.append(name)
            elif isinstance(feature, tfds.features.Tensor) and shape is not None and None not in shape:
                columns[name] = math.prod(shape)
        self.columns, self.cameras, self.texts = columns, cameras, tuple(texts)

    def read(self, episode: int, columns: Sequence[str], instruction: str) -> Rows:
        steps = self._steps(episode)
        count = len(_at(steps, instruction))
        values: dict[str, np.ndarray] = {}
        for name in columns:
            found = np.asarray(_at(steps, name))
            if found.dtype == object or len(found) != count:
                raise BadEpisode(f"column {name} does not hold numbers of all {count} steps")
            values[name] = found.reshape(count, -1)
        try:
            texts = [text.decode() if isinstance(text, bytes) else str(text) for text in _at(steps, instruction).tolist()]
        except UnicodeDecodeError as error:
            raise BadEpisode(f"{instruction} is no text: {one_line(error)}") from error
        return Rows(values, texts, max(count - 1, 0))

    def check_frames(self, episode: int, camera: str) -> None:
        steps = self._steps(episode)
        pictures = _at(steps, camera)
        missing = [i for i, picture in enumerate(pictures) if not picture]
        if missing:
            raise BadEpisode(f"picture {camera} of step {missing[0]} is missing")
        for name in (*self.columns, *self.texts):
            if len(_at(steps, name)) != len(pictures):
                raise BadEpisode(f"{camera} has {len(pictures)} pictures of {len(_at(steps, name))} steps")

    def frames(self, episode: int, camera: str, steps: Sequence[int]) -> np.ndarray:
        pictures = _at(self._steps(episode), camera)
        try:
            return np.stack([np.asarray(Image.open(io.BytesIO(pictures[step])).convert("RGB")) for step in steps])
        except (OSError, ValueError, TypeError, IndexError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadEpisode(f"a picture of {camera} cannot be read: {one_line(error)}") from error

    def _steps(self, episode: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self._starts, episode, side="right")) - 1
        file = self._files[shard]
        with _naming(epath.Path(file).name):
            version = stamp(epath.Path(file))
            return _parsed(os.fspath(self.path), self._described, file, version, self._form, episode - int(self._starts[shard]))


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except BadEpisode:
        raise
    except FileNotFoundError:
        raise BadEpisode(f"{what} is missing") from None
    except Exception as error:  # what a broken record makes protobuf and tensorflow-datasets raise has no common kind
        raise BadEpisode(f"{what} cannot be read: {one_line(error):.300}") from error


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    """The features of a step by their ways."""
    found: dict[str, Any] = {}
    for name, feature in features.items():
        found |= _flat(feature, f"{prefix}{name}.") if hasattr(feature, "items") else {f"{prefix}{name}": feature}
    return found


def _at(steps: Mapping[str, Any], name: str) -> np.ndarray:
    """A column by its way. Names of features may hold dots themselves."""
    for key, value in steps.items():
        if key == name:
            return value
        if name.startswith(f"{key}.") and isinstance(value, Mapping):
            return _at(value, name.removeprefix(f"{key}."))
    raise BadEpisode(f"it has no {name}")


# --- records -----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _builder(path: str, described: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(path)


@lru_cache(maxsize=64)
def _parser(path: str, described: str) -> Any:
    from tensorflow_datasets.core import example_parser

    return example_parser.ExampleParserNp(_builder(path, described).info.features.get_serialized_info())


@lru_cache(maxsize=4)
def _parsed(path: str, described: str, file: str, version: Stamp, form: str, number: int) -> dict[str, Any]:
    """The steps of a record, pictures as the bytes they are. A window's numbers and pictures are of one record."""
    return _parser(path, described).parse_example(_record(file, version, form, number))["steps"]


def _record(file: str, version: Stamp, form: str, number: int) -> bytes:
    if form == "array_record":
        reader = _reader(file, version)
        if number >= reader.num_records():
            raise BadEpisode(f"{epath.Path(file).name} holds {reader.num_records()} records: it breaks off")
        return reader.read([number])[0]
    places = _offsets(file, version)
    if number >= len(places):
        raise BadEpisode(f"{epath.Path(file).name} holds {len(places)} records: it breaks off")
    begin, length = places[number]
    with epath.Path(file).open("rb") as stream:
        stream.seek(begin)
        return stream.read(length)


@lru_cache(maxsize=64)
def _reader(file: str, version: Stamp) -> ArrayRecordReader:
    return ArrayRecordReader(file)


@lru_cache(maxsize=1024)
def _offsets(file: str, version: Stamp) -> tuple[tuple[int, int], ...]:
    """Where each whole record of a TFRecord file begins, and how long it is."""
    path = epath.Path(file)
    size = path.stat().length
    found, place = [], 0
    with path.open("rb") as stream:
        while place + FRAME.size <= size:
            stream.seek(place)
            length, _ = FRAME.unpack(stream.read(FRAME.size))
            begin = place + FRAME.size
            place = begin + length + CHECKSUM
            if place > size:
                break
            found.append((begin, length))
    return tuple(found)


# --- writing -----------------------------------------------------------------------------------------------------------------


class RldsWriter:
    """Writes into an empty directory; pictures as PNG, without loss."""

    def __init__(self, directory: epath.Path, robot: Robot):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info

        features = tfds.features

        def numbers(dimensions: Sequence[Any]) -> Any:
            return features.Tensor(shape=(len(dimensions),), dtype=np.float32)

        pictures = {one.name: features.Image(shape=(one.height, one.width, 3), encoding_format="png") for one in robot.cameras}
        step = {
            "observation": features.FeaturesDict({"state": numbers(robot.state), "images": features.FeaturesDict(pictures)}),
            "action": numbers(robot.action),
            INSTRUCTION: features.Text(),
            **{name: features.Scalar(np.bool_) for name in ("is_first", "is_last", "is_terminal")},
            **{name: features.Scalar(np.float32) for name in ("reward", "discount")},
        }
        name = re.sub(r"\W+", "_", robot.name).strip("_").lower() or "robot"
        identity = dataset_info.DatasetIdentity(name, tfds.core.Version("1.0.0"), os.fspath(directory), module_name="")
        info: Any = tfds.core.DatasetInfo(
            builder=identity,  # type: ignore[arg-type]
            features=features.FeaturesDict({"steps": features.Dataset(step)}),
            description=f"Demonstrations of {robot.name}.",
            metadata=tfds.core.MetadataDict({HZ: robot.hz, "robot": robot.name}),
        )
        self._writer = tfds.core.SequentialWriter(info, max_examples_per_shard=SHARD, file_format="array_record")  # type: ignore[arg-type]
        self._writer._serializer = _steady(info.features)  # it takes none from outside
        self._writer.initialize_splits(["train"])

    def add(self, recording: Recording) -> None:
        count = len(recording.state)
        action = np.zeros((count, recording.action.shape[1]), np.float32)
        action[: len(recording.action)] = recording.action
        images = {camera: _pngs(pictures) for camera, pictures in recording.images.items()}
        steps = [
            {
                "observation": {
                    "state": recording.state[i].astype(np.float32),
                    "images": {camera: pictures[i] for camera, pictures in images.items()},
                },
                "action": action[i],
                INSTRUCTION: recording.instruction,
                "is_first": i == 0,
                "is_last": i == count - 1,
                "is_terminal": i == count - 1,
                "reward": 0.0,
                "discount": 1.0,
            }
            for i in range(count)
        ]
        self._writer.add_examples({"train": [{"steps": steps}]})

    def close(self) -> None:
        self._writer.close_all()


def _steady(features: Any) -> Any:
    """What writes the same episode as the same bytes in every process: a set's identity is of its bytes, and orders a run."""
    from tensorflow_datasets.core import ExampleSerializer

    class Steady(ExampleSerializer):
        def serialize_example(self, example: Any) -> bytes:
            return self.get_tf_example(example).SerializeToString(deterministic=True)

    return Steady(features.get_serialized_info())


def _pngs(pictures: np.ndarray) -> list[bytes]:
    """One that is shown again, as by a camera slower than the arm, is not packed again."""
    made: list[bytes] = []
    for i, picture in enumerate(pictures):
        if i and np.array_equal(picture, pictures[i - 1]):
            made.append(made[-1])
            continue
        contents = io.BytesIO()
        Image.fromarray(picture).save(contents, "PNG")
        made.append(contents.getvalue())
    return made
