"""One process of two, started by test_checkpoints.py: saves on a mesh of both, finds damage that only one of them can see, goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
from etils import epath


def main(port: str, index: int, directory: Path) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    from blm_jax.errors import RequestError
    from blm_jax.train import checkpoints as module
    from blm_jax.train.checkpoints import Checkpoints
    from blm_jax.weights.steps import DamageError
    from tests.train.trees import ASSETS, PROVENANCE, abstract, values

    asked = abstract(1, 8, 1)

    def mine(trees: object) -> list[bytes]:
        return [shard.data.tobytes() for leaf in jax.tree.leaves(trees) for shard in leaf.addressable_shards]

    report: dict[str, object] = {}
    with Checkpoints(directory / "run", keep=2) as checkpoints:
        assert checkpoints.restore(*asked) is None
        for step in (1, 2, 3):
            checkpoints.save(step, *values(step, asked), {"step": step}, ASSETS, PROVENANCE)
        restored = checkpoints.restore(*asked)
        assert restored is not None
        report["whole"] = restored.step, mine((restored.params, restored.state)) == mine(values(3, asked)), checkpoints.steps()
        if index == 1:  # a shard of this process alone
            read_tree = module._read_tree

            def read(directory: epath.Path, abstract: object) -> dict[str, object]:
                if directory == checkpoints.directory / "3" / "params":
                    raise DamageError("params/ cannot be read (a shard of the second process)")
                return read_tree(directory, abstract)  # pyright: ignore

            module._read_tree = read
        restored = checkpoints.restore(*asked)
        assert restored is not None
        report["damaged"] = restored.step, mine((restored.params, restored.state)) == mine(values(2, asked)), checkpoints.steps()
        try:
            checkpoints.restore({"decoder": {}}, asked[1])
        except RequestError as error:
            report["another"] = str(error)
        checkpoints.save(3, *values(33, asked), {"step": 3}, ASSETS, PROVENANCE)
    (directory / f"report-{index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
