"""A Hugging Face directory: its config, its assets, and its tensors by slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.data.files import read_json
from blm_jax.errors import RequestError
from blm_jax.weights.config_json import from_json, read_config_json
from blm_jax.weights.names import Entry, Path, Slices, Tensor, canonical, hub_tensors, pieces, some, table
from blm_jax.weights.safetensors_file import ByteCount, Stored, copy_cast, read_block, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TRAINED_CONTRACT = "policy.json"  # among the assets of a training checkpoint: in a MODEL it is policy/config.json
_WEIGHT_ENDINGS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
_ASSET_DIRECTORIES = ("additional_chat_templates",)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class HubSource:
    """Weights in the Hub's layout. Opening checks every name and shape, before anything is read."""

    directory: epath.Path
    config: BackboneConfig
    entries: dict[Path, Entry]
    stored: dict[str, Stored]  # by the Hub's name
    count: ByteCount = field(default_factory=ByteCount)

    @staticmethod
    def open(directory: epath.Path) -> HubSource:
        config = from_json(read_config_json(directory), str(directory / "config.json"))
        entries = table(config)
        source = HubSource(directory, config, entries, _stored(directory))
        source._check()
        return source

    def _check(self) -> None:
        wanted = {tensor.name: tensor.entry.hub_shape for tensor in hub_tensors(self.entries)}
        missing = [name for name in wanted if name not in self.stored]
        if missing:
            raise RequestError(f"{self.directory}: {some(missing)} missing from its safetensors files; fetch them again")
        extra = [name for name in self.stored if name not in wanted and not (self.config.decoder.tied and name == _HEAD)]
        if extra:
            raise RequestError(f"{self.directory}: {some(extra)} not part of the model that config.json describes; mend config.json")
        for name, shape in wanted.items():
            if self.stored[name].shape != shape:
                found = list(self.stored[name].shape)
                raise RequestError(f"{self.directory}: {name} has shape {found}, config.json makes it {list(shape)}; one is wrong")
        if self.config.decoder.tied and _HEAD in self.stored:
            self._check_redundant_head()

    def _check_redundant_head(self) -> None:
        head, embedding = self.stored[_HEAD], self.stored[_EMBEDDING]
        same = head.dtype == embedding.dtype and head.shape == embedding.shape
        if not same or any(
            not np.array_equal(read_block(head, head.shape, part).view(np.uint8), read_block(embedding, head.shape, part).view(np.uint8))
            for part in pieces(head.shape, head.dtype.itemsize)
        ):
            raise RequestError(f"{self.directory}: {_HEAD} is not the embedding: tie_word_embeddings in config.json must be false")

    def dtype_of(self, tensor: Tensor) -> np.dtype:
        return self.stored[tensor.name].dtype

    def dtype(self, entry: Entry) -> np.dtype:
        """Of the array in the tree: the narrowest that holds every layer exactly."""
        dtypes = {self.dtype_of(tensor) for tensor in entry.tensors()}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)

    def read_tensor(self, tensor: Tensor, slices: Slices) -> np.ndarray:
        """A slice of one tensor in the Hub's order, its axes split as in `Entry.block`."""
        return read_block(self.stored[tensor.name], tensor.entry.block, slices, self.count)

    def fill(self, entry: Entry, index: Slices, out: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """Put a slice of an array of the tree into `out`, in its dtype."""
        layers: Sequence[int | None] = [None] if entry.layers is None else range(entry.layers)[index[0]]
        block_index = index if entry.layers is None else index[1:]

        def jobs() -> Iterator[tuple[Tensor, Slices, np.ndarray]]:
            for number, layer in enumerate(layers):
                tensor = Tensor(entry, layer)
                place = out if layer is None else out[number]
                within = entry.hub_slices(block_index)
                lengths = tuple(part.stop - part.start for part in within)
                # Rows of which only a part is wanted span more of the file than they hold: count what they span.
                spread = math.prod(entry.block[1:]) / math.prod(lengths[1:])
                for piece in pieces(lengths, math.ceil(self.dtype_of(tensor).itemsize * spread)):
                    moved = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(within, piece, strict=True))
                    yield tensor, moved, place[entry.tree_slices(piece)]

        def job(task: tuple[Tensor, Slices, np.ndarray]) -> None:
            tensor, slices, place = task
            copy_cast(self.read_tensor(tensor, slices).transpose(entry.order), place)

        for _ in pool.map(job, jobs()):
            pass

    def assets(self) -> epath.Path:
        return self.directory

    def readers(self) -> int:
        """How many pieces may be read at a time."""
        return 4


def asset_names(directory: epath.Path) -> list[str]:
    """Files beside the weights (config.json, the tokenizer's, ...), to be carried along as they are."""
    found: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.is_dir() and path.name in _ASSET_DIRECTORIES:
            found += [f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if not file.is_dir()]
        elif path.is_dir() or path.name.startswith(".") or path.name == TRAINED_CONTRACT:
            continue
        elif not path.name.endswith(_WEIGHT_ENDINGS):
            found.append(path.name)
    return found


def _stored(directory: epath.Path) -> dict[str, Stored]:
    """Every tensor of the directory's files, by the Hub's name."""
    index = directory / INDEX
    if index.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise RequestError(f"{index} has no weight_map; fetch it again")
        if not all(isinstance(file, str) and file.endswith(".safetensors") and "/" not in file for file in named.values()):
            raise RequestError(f"{index}: its weight_map must name safetensors files beside it; fetch it again")
        files = sorted(set(named.values()))
    elif (directory / SINGLE).exists():
        named, files = {}, [SINGLE]
    else:
        others = sorted(path.name for path in directory.iterdir() if path.name.endswith((".safetensors", ".bin")))
        state = f"no {INDEX} or {SINGLE} (there is {', '.join(others[:3])})" if others else f"no weights: neither {INDEX} nor {SINGLE}"
        raise RequestError(f"{directory} has {state}")
    stored: dict[str, Stored] = {}
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if canonical(name) in stored:
                raise RequestError(f"{directory}: {name} is in {stored[canonical(name)].file.name} and again in {file}; remove one of them")
            stored[canonical(name)] = tensor
    for name, file in named.items():
        if canonical(name) not in stored or stored[canonical(name)].file.name != file:
            raise RequestError(f"{index} says that {name} is in {file}, but it is not; fetch both again")
    return stored
