"""The checkpoints of a run: which of them are finished, and what each of them holds.

    RUN/checkpoints/STEP/params/             orbax: what is trained
    RUN/checkpoints/STEP/state/              orbax: the optimizer's state and the like
    RUN/checkpoints/STEP/data/               the data's place, JSON
    RUN/checkpoints/STEP/assets/             config.json, the tokenizer's files, a policy's contract: verbatim
    RUN/checkpoints/STEP/provenance.json     what was trained, on which frozen base, by which versions
    RUN/checkpoints/STEP/contents.json       every array with its shape, dtype and sum, every small file with its SHA-256
    RUN/checkpoints/STEP/commit_success.txt  written last: what lacks it was never finished, or is being removed

No checksum of orbax's covers an array's values, so contents.json holds one of each: a sum that does not depend on how an
array is cut into files or over devices. `train/checkpoints.py` writes all this.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from etils import epath

from blm_jax.data.files import one_line
from blm_jax.weights.checkpoint import COMMIT
from blm_jax.weights.names import Slices

CHECKPOINTS, STATE, DATA, CONTENTS = "checkpoints", "state", "data", "contents.json"


class DamageError(Exception):
    """What is wrong with a checkpoint that was finished once."""


@dataclass(frozen=True)
class Described:
    """One array."""

    shape: tuple[int, ...]
    dtype: str
    sum: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Contents:
    """What contents.json says."""

    arrays: dict[str, dict[str, Described]]  # by item, then by the path in its tree, joined by dots
    files: dict[str, str]  # SHA-256 by name

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"digest": self.digest, **asdict(self)}, indent=1) + "\n"


def describe_files(directory: epath.Path, names: Iterable[str]) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def read_contents(directory: epath.Path) -> Contents:
    try:
        raw = json.loads((directory / CONTENTS).read_text())
        arrays = {
            item: {path: Described(tuple(value["shape"]), value["dtype"], value["sum"]) for path, value in described.items()}
            for item, described in raw["arrays"].items()
        }
        contents = Contents(arrays, dict(raw["files"]))
        if contents.digest == raw["digest"]:
            return contents
        raise DamageError(f"{CONTENTS} is not as it was written")
    except FileNotFoundError:
        raise DamageError(f"{CONTENTS} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{CONTENTS} is not as it was written ({one_line(error)})") from None


def check_files(directory: epath.Path, contents: Contents) -> None:
    for name, digest in contents.files.items():
        try:
            found = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise DamageError(f"{name} is missing") from None
        if found != digest:
            raise DamageError(f"{name} is not as it was written")


def finished_steps(directory: epath.Path) -> list[int]:
    """Ascending; whether they are still as they were written is another question."""
    if not directory.exists():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted(int(name) for name in names if is_step(name) and (directory / name / COMMIT).exists())


def is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


# Sums: the bits of each number times an odd weight made of its place, modulo 2**32. One number that changes always changes the
# sum; how an array is divided, and in which order it is summed, does not. `xp` is NumPy or jax.numpy.


def weighted_sum(bits: Any, index: Any, xp: Any) -> Any:
    """Of unsigned integers of 32 bits and their places in the array, counted row by row modulo 2**32."""
    half = xp.uint32(16)
    bits = bits ^ (bits >> half)  # round numbers end in zeros, which an odd weight would leave there
    weight = index * xp.uint32(0x9E3779B1)  # 2**32 over the golden ratio: neighbours get weights far apart
    return xp.sum(bits * ((weight ^ (weight >> half)) | xp.uint32(1)), dtype=xp.uint32)


def sum_of_part(block: np.ndarray, shape: tuple[int, ...], slices: Slices) -> int:
    """What the part `slices` of an array of this shape, of floating-point numbers, adds to its sum."""
    index = np.zeros((), np.uint64)
    for axis, part in enumerate(slices):
        place = np.arange(part.start, part.stop, dtype=np.uint64) * np.uint64(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + place.reshape(-1, *(1,) * (len(shape) - axis - 1))
    bits = np.ascontiguousarray(block).view(f"u{block.dtype.itemsize}").astype(np.uint32)
    with np.errstate(over="ignore"):
        return int(weighted_sum(bits, np.broadcast_to(index, block.shape).astype(np.uint32), np))


def compare_sums(item: str, found: Mapping[str, int], wanted: Mapping[str, Described]) -> None:
    wrong = [path for path, value in found.items() if value != wanted[path].sum]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise DamageError(f"{item}/: the values of {wrong[0]}{more} are not those that were written")
