"""Weights from one form of MODEL to another: streamed, bit for bit, by any number of processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from etils import epath

from blm_jax.convert.output import Output
from blm_jax.convert.team import Team
from blm_jax.data.files import open_path
from blm_jax.errors import RequestError, RunError
from blm_jax.weights import checkpoint
from blm_jax.weights.adapters import AdaptedSource, write_for_peft
from blm_jax.weights.config_json import read_config_json, with_video_positions
from blm_jax.weights.hashing import combine, hashed_pieces, progress, tensor_bytes
from blm_jax.weights.hub import INDEX, asset_names
from blm_jax.weights.names import Tensor, hub_tensors
from blm_jax.weights.policy import POLICY, check_policy, copy_policy, has_policy, policy_bytes
from blm_jax.weights.safetensors_file import CODES, PlannedFile, is_local, plan_files
from blm_jax.weights.source import PathLike, Source, open_source
from blm_jax.weights.trained import TrainedSource

Form = Literal["hf", "checkpoint", "adapter"]
_WRITERS = 2  # pieces written at a time, beside the one that is hashed


def convert(
    src: PathLike, dst: PathLike, to: Form, *, max_shard_bytes: int = 5_000_000_000, backbone: PathLike | None = None
) -> dict[str, Any]:
    """Write the MODEL at `src` to a new directory `dst`: as a Hugging Face directory or as an orbax checkpoint; of one trained with
    low-rank adapters, which both of these have added to the weights, the adapters alone.

    A policy beside the backbone travels with it, byte for byte. Of a training checkpoint each tensor gets the dtype of the base's;
    `backbone` says where the base lies if it was moved.
    In a run of several processes each of them calls this and writes a part. Returns what `blm convert --json` prints.
    """
    if to not in get_args(Form):
        raise RequestError(f"--to {to}: it must be hf, checkpoint or adapter")
    if max_shard_bytes < 1:
        raise RequestError(f"files of at most {max_shard_bytes} bytes hold nothing; give a larger size")
    started = time.monotonic()
    team = Team.of_all_processes()
    target = team.together(lambda: open_path(dst))
    source = team.together(lambda: open_source(src, backbone))
    if to == "adapter":
        return _adapter(source, src, target, team, started)
    tensors = hub_tensors(source.entries)
    total = sum(tensor_bytes(source, tensor) for tensor in tensors)
    policy = src if has_policy(src) else None
    if isinstance(source, TrainedSource):
        team.together(lambda: team.leads and source.check_values())
    if policy is not None:
        team.together(lambda: check_policy(src))
    try:
        with Output(target, total + (policy_bytes(policy) if policy else 0), team) as output:
            work = _Work(source, tensors, policy, output.directory, team)
            fingerprint = work.to_hub(max_shard_bytes) if to == "hf" else work.to_checkpoint(str(src))
            files = len(_files(output.directory)) if team.leads else 0
    except OSError as error:
        raise RunError(f"writing {dst} failed: {error.strerror or error}") from error
    return {
        "out": str(dst),
        "to": to,
        "files": files,
        "bytes": total,
        "tensors": len(tensors),
        "fingerprint": fingerprint,
        "seconds": round(time.monotonic() - started, 3),
    }


def _adapter(source: Source, src: PathLike, target: epath.Path, team: Team, started: float) -> dict[str, Any]:
    if not isinstance(source, AdaptedSource):
        raise RequestError(f"{src} has no low-rank adapters: it was not trained with lora; convert it --to hf")
    described = [tensor for entry in source.adapters.entries.values() for tensor in entry.tensors()]
    size = sum(4 * math.prod(tensor.entry.block) for tensor in described)
    with Output(target, size, team) as output:
        if team.leads:
            write_for_peft(output.directory, source.adapters, source.origin)
    seconds = round(time.monotonic() - started, 3)
    return {"out": str(target), "to": "adapter", "files": 2, "bytes": size, "tensors": len(described), "seconds": seconds}


@dataclass(frozen=True)
class _Work:
    source: Source
    tensors: list[Tensor]
    policy: PathLike | None  # the MODEL that has one
    directory: epath.Path
    team: Team

    def to_hub(self, max_shard_bytes: int) -> str:
        described = {tensor.name: (self.source.dtype_of(tensor), tensor.entry.hub_shape) for tensor in self.tensors}
        plan = plan_files(described, max_shard_bytes)
        by_name = {tensor.name: tensor for tensor in self.tensors}
        jobs = [(file, [by_name[name] for name in file.tensors]) for file in self.team.share(plan)]
        digests: dict[str, bytes] = {}

        def write() -> None:
            with progress(self.source, [tensor for _, group in jobs for tensor in group], "convert", show=self.team.leads) as bar:
                for planned, group in jobs:
                    with (self.directory / planned.name).open("wb") as file:
                        file.write(planned.header())
                        for _, _, block in hashed_pieces(self.source, group, digests, bar):
                            file.write(block.view(np.uint8).data)
                        file.flush()
                        if is_local(self.directory):
                            os.fsync(file.fileno())

        self.team.together(write)
        self.team.together(lambda: self._finish_hub(plan))
        return self._fingerprint(digests)

    def _finish_hub(self, plan: list[PlannedFile]) -> None:
        if not self.team.leads:
            return
        homes = {name: file.name for file in plan for name in file.tensors}
        index = {"metadata": {"total_size": sum(file.data_bytes for file in plan)}, "weight_map": dict(sorted(homes.items()))}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._copy_policy()
        self._copy_assets(self.directory)  # config.json last: without it this is no MODEL

    def to_checkpoint(self, origin: str) -> str:
        source, params = self.source, self.directory / checkpoint.PARAMS
        dtypes = {path: source.dtype(entry) for path, entry in source.entries.items()}
        self.team.together(lambda: self.team.leads and checkpoint.create_arrays(params, source.entries, dtypes))
        arrays = checkpoint.open_for_writing(params, source.entries, dtypes)
        mine = self.team.share(self.tensors)
        digests: dict[str, bytes] = {}

        def write() -> None:
            with progress(source, mine, "convert", show=self.team.leads) as bar, ThreadPoolExecutor(_WRITERS) as pool:
                written: deque[Future[None]] = deque()
                for tensor, part, block in hashed_pieces(source, mine, digests, bar):
                    if len(written) == _WRITERS:
                        written.popleft().result()
                    written.append(pool.submit(checkpoint.write_piece, arrays[tensor.entry.path], tensor, part, block))
                for future in written:
                    future.result()

        self.team.together(write)
        fingerprint = self._fingerprint(digests)
        self.team.together(lambda: self._finish_checkpoint(origin, fingerprint))
        return fingerprint

    def _finish_checkpoint(self, origin: str, fingerprint: str) -> None:
        if not self.team.leads:
            return
        source = self.source
        dtypes = {tensor: source.dtype_of(tensor) for tensor in self.tensors}
        narrowed = {tensor.name: CODES[dtype] for tensor, dtype in dtypes.items() if dtype != source.dtype(tensor.entry)}
        self._copy_policy()
        self._copy_assets(self.directory / checkpoint.ASSETS)
        provenance = checkpoint.provenance(origin, fingerprint, source.config, narrowed)
        (self.directory / checkpoint.PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
        checkpoint.write_tree(self.directory, source.entries)
        (self.directory / checkpoint.COMMIT).write_text("")

    def _copy_policy(self) -> None:
        if self.policy is not None:
            copy_policy(self.policy, self.directory / POLICY)

    def _copy_assets(self, directory: epath.Path) -> None:
        """Everything beside the weights, as it is; config.json last."""
        assets = self.source.assets()
        for name in sorted(asset_names(assets), key=lambda name: name == "config.json"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with (assets / name).open("rb") as source, (directory / name).open("wb") as target:
                raw = read_config_json(assets) if name == "config.json" else None
                changed = raw and with_video_positions(raw, self.source.config.video_positions)
                if changed != raw:  # chosen here, not by the model's makers
                    target.write(json.dumps(changed, indent=2).encode() + b"\n")
                else:
                    shutil.copyfileobj(source, target)

    def _fingerprint(self, digests: dict[str, bytes]) -> str:
        return combine(self.source, self.team.merge(digests, [tensor.name for tensor in self.tensors]))


def _files(directory: epath.Path) -> list[epath.Path]:
    return [file for path in directory.iterdir() for file in (_files(path) if path.is_dir() else [path])]
