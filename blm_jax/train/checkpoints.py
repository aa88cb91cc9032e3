"""Checkpoints of a run, written by orbax while the run goes on: trees in, trees out.

`weights/steps.py` says what lies in one. Locally a checkpoint is a sibling that is renamed when all of it is there; a store
that knows no renaming gets the marker last. Either way only what has the marker counts, and what is removed loses it first.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from blm_jax.data.files import one_line, open_path, read_json
from blm_jax.errors import RequestError, RunError
from blm_jax.weights import names
from blm_jax.weights.checkpoint import ASSETS, COMMIT, PARAMS, PROVENANCE
from blm_jax.weights.safetensors_file import is_local
from blm_jax.weights.source import PathLike
from blm_jax.weights.steps import (
    CONTENTS,
    DATA,
    STATE,
    Contents,
    DamageError,
    Described,
    check_files,
    compare_sums,
    describe_files,
    finished_steps,
    is_step,
    read_contents,
    weighted_sum,
)

Tree = Mapping[str, Any]
Result = TypeVar("Result")
_DATA_FILE = f"{DATA}/metadata"  # orbax's names for its own files
_TREE_FILE = "_METADATA"
_MOST_LAYERS = 256
_UNFINISHED = ".orbax-checkpoint-tmp"
_NOT_DAMAGE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # tensorstore's words: the store's fault
_DAMAGE, _MESSAGE_BYTES = "damaged: ", 512


@dataclass(frozen=True)
class Restored:
    step: int
    params: dict[str, Any]
    state: dict[str, Any]
    data: dict[str, Any]
    provenance: dict[str, Any]


class Checkpoints:
    """Those of one run, below RUN/checkpoints. All processes of a run take the same calls in the same order.

    Kept are the last `keep`, the `keep_best` with the lowest metric `best`, and those of every `keep_every`-th step.
    `rename` says whether the store can rename a directory at once: local disks can, buckets cannot, mounted ones neither.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        keep: int = 3,
        best: str | None = None,
        keep_best: int = 1,
        keep_every: int | None = None,
        rename: bool | None = None,
    ):
        if keep < 1 or keep_best < 0 or (keep_every is not None and keep_every < 1):
            raise RequestError(f"keep {keep}, keep_best {keep_best}, keep_every {keep_every}: at least the last checkpoint must be kept")
        self.directory = _absolute(open_path(directory))
        if not is_local(self.directory) and not str(self.directory).startswith("gs://"):
            raise RequestError(f"{directory}: checkpoints of a run are written to local disks and to gs:// buckets; choose one of these")
        self.keep, self.best, self.keep_best, self.keep_every = keep, best, keep_best, keep_every
        self._leads = jax.process_index() == 0
        self._background = ThreadPoolExecutor(1, "checkpoints")
        self._finishing: tuple[int, Future[None]] | None = None
        self._files: Callable[[], None] | None = None
        self._checkpointer = self._open_checkpointer(is_local(self.directory) if rename is None else rename)
        self._together(self._tidy)
        self._metrics = {step: self._metric(step) for step in finished_steps(self.directory)}

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Of the checkpoints that are finished, ascending; without those found damaged."""
        return sorted(self._metrics)

    def latest(self) -> int | None:
        return max(self._metrics, default=None)

    # Writing

    def save(
        self,
        step: int,
        params: Tree,
        state: Tree,
        data: Mapping[str, Any],
        assets: Mapping[str, bytes],
        provenance: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> float:
        """Begin to write a checkpoint; returns the seconds for which the run stood still, the wait for the last one included.

        What was given may be changed or donated at once. A step that has its checkpoint is left as it is.
        """
        started = time.monotonic()
        self.wait()
        if step in self._metrics:
            return time.monotonic() - started
        target = self.directory / str(step)
        if self._leads and target.exists():
            _say(f"{target}, which is damaged, is written again")
        trees = {PARAMS: dict(params), STATE: dict(state)}
        sums = {item: _sums(tree) for item, tree in trees.items()}
        said = {**provenance, "metrics": dict(metrics or {})}
        temporary = self._checkpointer.get_temporary_path(target).get()
        self._files = partial(_write_files, temporary, sums, dict(assets), said)
        try:
            self._checkpointer.save(
                target,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(trees[PARAMS], save_args=jax.tree.map(_in_pieces, trees[PARAMS])),
                    state=ocp.args.PyTreeSave(trees[STATE], save_args=jax.tree.map(_in_pieces, trees[STATE])),
                    data=ocp.args.JsonSave(dict(data)),
                ),
                force=True,  # it takes away what is damaged: a good one was left alone above
            )
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._finishing = step, self._background.submit(self._finish, step, _number(said["metrics"].get(self.best)))
        return time.monotonic() - started

    def wait(self) -> None:
        """Until the last checkpoint is finished. Raises where it could not be."""
        if self._finishing is not None:
            (step, finishing), self._finishing = self._finishing, None
            try:
                finishing.result()
            except Exception as error:
                raise self._failed(step, error) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def _open_checkpointer(self, rename: bool) -> ocp.AsyncCheckpointer:
        modes = ocp.options.AtomicityMode
        atomicity = ocp.options.AtomicityOptions(mode=modes.ATOMIC_RENAME if rename else modes.COMMIT_FILE)
        # Called by the first process between the last array and the renaming or the marker.
        options = ocp.AsyncOptions(post_finalization_callback=lambda: self._files and self._files())
        # Not compressed: weights and moments hardly shrink, and it would cost the hosts their cores.
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(atomicity_options=atomicity, async_options=options),
            params=ocp.PyTreeCheckpointHandler(use_compression=False),
            state=ocp.PyTreeCheckpointHandler(use_compression=False),
            data=ocp.JsonCheckpointHandler(),
        )
        return ocp.AsyncCheckpointer(handler, async_options=options, atomicity_options=atomicity)

    def _finish(self, step: int, metric: float) -> None:
        self._checkpointer.wait_until_finished()
        metrics = {**self._metrics, step: metric}
        kept = self._kept(metrics)
        self._metrics = {step: metrics[step] for step in kept}
        for old in metrics.keys() - kept if self._leads else ():
            _remove(self.directory / str(old))

    def _kept(self, metrics: Mapping[int, float]) -> set[int]:
        steps = sorted(metrics)
        measured = sorted((step for step in steps if math.isfinite(metrics[step])), key=lambda step: (metrics[step], -step))
        forever = [step for step in steps if self.keep_every and step % self.keep_every == 0]
        return {*steps[-self.keep :], *measured[: self.keep_best], *forever}

    def _metric(self, step: int) -> float:
        try:
            return _number(read_json(self.directory / str(step) / PROVENANCE)["metrics"].get(self.best))
        except (RequestError, KeyError, AttributeError):
            return math.nan  # whether it is damaged is asked when it is restored

    def _failed(self, step: int, error: Exception) -> RunError:
        return RunError(f"the checkpoint {self.directory / str(step)} could not be written ({one_line(error)[:300]})")

    def _tidy(self) -> None:
        """Take away what killed runs left behind."""
        if not self._leads:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.directory.iterdir()):
                if path.name.endswith(_UNFINISHED) or (is_step(path.name) and not (path / COMMIT).exists()):
                    _say(f"{path} is partial, for what wrote or removed it was stopped: removed")
                    path.rmtree()
        except OSError as error:
            raise RequestError(f"{self.directory} cannot be written: {error.strerror or one_line(error)}") from None

    # Reading

    def restore(self, abstract_params: Tree, abstract_state: Tree) -> Restored | None:
        """The newest good checkpoint, or None where there is none yet; onto the shardings that the abstract trees name.

        One that is damaged is named, left where it is, and passed over. One of another tree is refused.
        """
        self.wait()
        asked = {PARAMS: _with_shardings(abstract_params), STATE: _with_shardings(abstract_state)}
        found = self.steps()
        for step in reversed(found):
            try:
                return self._restore(step, asked)
            except DamageError as damage:
                self._metrics.pop(step)  # so that it is not counted among those that are kept
                if self._leads:
                    _say(f"{self.directory / str(step)} is damaged: {damage}; passed over")
        if found:
            raise RequestError(f"{self.directory} has no checkpoint that is not damaged; remove the directory to begin anew")
        return None

    def _restore(self, step: int, asked: Mapping[str, Tree]) -> Restored:
        directory = self.directory / str(step)

        def describe() -> Contents:
            contents = read_contents(directory)
            if self._leads:
                check_files(directory, contents)
            return contents

        contents = self._together(describe)
        for item, tree in asked.items():
            _check_tree(directory, item, contents.arrays[item], tree)
        trees = self._together(lambda: {item: _read_tree(directory / item, tree) for item, tree in asked.items()})
        for item, tree in trees.items():
            found = {path: int(leaf.value) for path, leaf in _sums(tree).items()}  # by all processes: all of them see the same
            compare_sums(item, found, contents.arrays[item])
        data, provenance = self._together(lambda: (read_json(directory / _DATA_FILE), read_json(directory / PROVENANCE)))
        return Restored(step, trees[PARAMS], trees[STATE], data, provenance)

    def _together(self, work: Callable[[], Result]) -> Result:
        """What each process does for itself. Where it fails for one, all of them know, and none waits for another in vain."""
        try:
            result, told, failure = work(), "", None
        except DamageError as damage:
            result, told, failure = None, f"{_DAMAGE}{damage}", damage
        except (RequestError, RunError, OSError) as error:
            result, told, failure = None, one_line(error), error
        problems = {index: problem for index, problem in enumerate(_gather(told)) if problem}
        failed = [index for index, problem in problems.items() if not problem.startswith(_DAMAGE)]
        if failed and not isinstance(failure, RequestError | RunError):
            raise RunError(f"process {failed[0]} failed at {self.directory} ({problems[failed[0]]})") from failure
        if failed and failure is not None:
            raise failure
        if problems:
            raise DamageError(next(iter(problems.values())).removeprefix(_DAMAGE))
        return result  # pyright: ignore[reportReturnType]


def _gather(told: str) -> list[str]:
    """What each process says."""
    if jax.process_count() == 1:
        return [told]
    from jax.experimental import multihost_utils

    mine = np.frombuffer(told.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in np.asarray(multihost_utils.process_allgather(mine))]


def _write_files(directory: epath.Path, sums: Mapping[str, Mapping[str, _Sum]], assets: Mapping[str, bytes], said: Tree) -> None:
    """What is no array, into a checkpoint that is whole but for that."""
    contents = {f"{ASSETS}/{name}": value for name, value in assets.items()}
    contents[PROVENANCE] = json.dumps(said, indent=2).encode() + b"\n"
    for name, value in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(value)
    digests = describe_files(directory, [*contents, _DATA_FILE, *(f"{item}/{_TREE_FILE}" for item in sums)])
    arrays = {
        item: {path: Described(leaf.shape, leaf.dtype, int(leaf.value)) for path, leaf in leaves.items()} for item, leaves in sums.items()
    }
    (directory / CONTENTS).write_text(Contents(arrays, digests).to_json())


def _in_pieces(leaf: jax.Array) -> ocp.SaveArgs:
    """A piece is read whole: small enough for one layer, or the slice of another mesh, to be read alone."""
    # Orbax divides an axis that is named down to single places: right for a large stack of layers, ruin for an embedding.
    stack = leaf.ndim > 2 and leaf.shape[0] <= _MOST_LAYERS and leaf.nbytes > names.PIECE_BYTES
    return ocp.SaveArgs(chunk_byte_size=max(names.PIECE_BYTES, leaf.dtype.itemsize), shard_axes=(0,) if stack else ())


def _remove(directory: epath.Path) -> None:
    (directory / COMMIT).unlink(missing_ok=True)  # first, so that half of it never passes for a checkpoint
    directory.rmtree()


# Trees


def fingerprint_tree(tree: Tree) -> str:
    """Of all bits of arrays on their devices: whether a tree is still what it was. All processes get the same."""
    sums = {path: str(Described(leaf.shape, leaf.dtype, 0)) + f" {int(leaf.value)}" for path, leaf in sorted(_sums(tree).items())}
    return "sha256:" + hashlib.sha256(json.dumps(sums).encode()).hexdigest()


@dataclass(frozen=True)
class _Sum:
    shape: tuple[int, ...]
    dtype: str
    value: jax.Array  # on the devices until it is asked for


def _sums(tree: Tree) -> dict[str, _Sum]:
    leaves = _leaves(tree)
    together: dict[Any, list[tuple[str, jax.Array]]] = {}  # a program runs on one set of devices
    for path, leaf in leaves:
        together.setdefault(frozenset(leaf.sharding.device_set), []).append((path, leaf))
    values = {
        path: value for group in together.values() for path, value in zip(dict(group), _sum([leaf for _, leaf in group]), strict=True)
    }
    return {path: _Sum(leaf.shape, leaf.dtype.name, values[path]) for path, leaf in leaves}


@jax.jit
def _sum(leaves: list[jax.Array]) -> list[jax.Array]:
    sums = []
    for leaf in leaves:
        numbers = jnp.issubdtype(leaf.dtype, jnp.floating)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}") if numbers else leaf
        index = jnp.uint32(0)
        for axis in range(leaf.ndim):
            place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            index += place * jnp.uint32(math.prod(leaf.shape[axis + 1 :]) % 2**32)
        sums.append(weighted_sum(bits.astype(jnp.uint32), index, jnp))
    return sums


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _with_shardings(abstract: Tree) -> dict[str, Any]:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default), dict(abstract))


def _read_tree(directory: epath.Path, abstract: Tree) -> dict[str, Any]:
    """By the handler alone: a checkpointer's barriers would wait in vain for a process that found damage."""
    arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        try:
            return ocp.PyTreeCheckpointHandler().restore(directory, args=arguments)
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # the fault of this machine, not of the files
        except Exception as error:  # of no kind at all, where values cannot be read
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            told, denied = one_line(cause)[:200], isinstance(cause, PermissionError) or any(word in str(cause) for word in _NOT_DAMAGE)
        # Orbax leaves the reads of other arrays behind, and each would fill a screen when it ends or is thrown away.
        time.sleep(0.05)
        gc.collect()
    finally:
        sys.unraisablehook = hook
    raise RunError(f"{directory} cannot be read ({told})") if denied else DamageError(f"{directory.name}/ cannot be read ({told})")


def _check_tree(directory: epath.Path, item: str, found: Mapping[str, Described], asked: Tree) -> None:
    """Refuse another tree, and name what differs first."""
    wanted = {path: Described(leaf.shape, leaf.dtype.name, 0) for path, leaf in _leaves(asked)}
    lines = [
        f"{path} is {found.get(path, 'missing')}, this run has {wanted.get(path, 'none')}"
        for path in sorted(found.keys() | wanted.keys())
        if str(found.get(path)) != str(wanted.get(path))
    ]
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise RequestError(
            f"{directory / item} is of another model or another choice of what is trained: {'; '.join(lines[:3])}{more}. "
            "Go on with the config it was begun with, or choose another directory"
        )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _absolute(path: epath.Path) -> epath.Path:
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def _say(line: str) -> None:
    print(f"blm: {line}", file=sys.stderr, flush=True)
