"""One process of several, started by test_processes.py at a terminal: loads onto the mesh of all, and converts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np


def main(port: str, count: int, index: int, hub: Path, out: Path) -> None:
    sys.stderr.isatty = lambda: True  # pyright: ignore
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
    from blm_jax import mesh as meshes
    from blm_jax.config import MeshConfig
    from blm_jax.convert import command
    from blm_jax.errors import RunError
    from blm_jax.models.mllm import abstract_params
    from blm_jax.weights import hashing, load
    from blm_jax.weights.source import open_source, read_config

    wanted = np.load(hub.parent / "wanted.npz")
    report: dict[str, object] = {"loads": {}}
    for name, sizes in {"tensor": MeshConfig(1, 1, 8), "fsdp": MeshConfig(1, 8, 1), "replicated": MeshConfig(8, 1, 1)}.items():
        opened = []
        load.open_source = lambda path, backbone, opened=opened: opened.append(open_source(path, backbone)) or opened[-1]
        params = load.load_params(hub, abstract_params(read_config(hub), mesh=meshes.make_mesh(sizes)))
        mine = 0
        equal = True
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            shards = {str(shard.index): shard for shard in leaf.addressable_shards}
            mine += sum(shard.data.nbytes for shard in shards.values())
            value = wanted[jax.tree_util.keystr(path)]
            equal &= all(np.array_equal(shard.data, value[shard.index]) for shard in leaf.addressable_shards)
        report["loads"][name] = {"read": opened[0].count.read, "mine": mine, "equal": equal}  # pyright: ignore

    opened = []
    command.open_source = lambda path, backbone: opened.append(open_source(path, backbone)) or opened[-1]
    for name, source, to in (("checkpoint", hub, "checkpoint"), ("hf", hub, "hf"), ("back", out / "checkpoint", "hf")):
        done = command.convert(source, out / name, to, max_shard_bytes=100_000)  # pyright: ignore
        report[name] = {**done, "read": opened[-1].count.read}

    if index == count - 1:  # where one fails, all do

        def fail(*arguments: object) -> None:
            raise OSError(5, "the disk of the last process")

        hashing._read = fail  # pyright: ignore
    try:
        command.convert(hub, out / "failed", "checkpoint")
    except RunError as error:
        report["failure"] = str(error)
    (out / f"report-{index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
