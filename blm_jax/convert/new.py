"""A MODEL out of parameters that were made here, in the Hub's layout, as all that trains and loads expects one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.convert.output import Output
from blm_jax.convert.team import Team
from blm_jax.data.files import open_path
from blm_jax.weights.config_json import to_json
from blm_jax.weights.names import hub_tensors, leaves, table
from blm_jax.weights.safetensors_file import plan_files


def write_new_model(path: epath.PathLike, config: BackboneConfig, params: Mapping[str, Any], assets: Mapping[str, bytes]) -> None:
    """`params` is the tree of an Mllm's; `assets` are the files of tokenizer and processors, by name."""
    drawn = {place: np.asarray(leaf) for place, leaf in leaves(params)}
    tensors = {tensor.name: tensor for tensor in hub_tensors(table(config))}
    size = sum(leaf.nbytes for leaf in drawn.values())
    [planned] = plan_files({name: (np.dtype(np.float32), tensor.entry.hub_shape) for name, tensor in tensors.items()}, size)
    with Output(open_path(path), size + sum(map(len, assets.values())), Team()) as output:
        with (output.directory / "model.safetensors").open("wb") as file:
            file.write(planned.header())
            for name in planned.tensors:
                entry, layer = tensors[name].entry, tensors[name].layer
                block = drawn[entry.path] if layer is None else drawn[entry.path][layer]
                file.write(np.ascontiguousarray(block.transpose(np.argsort(entry.order)), np.float32).tobytes())
        for name, content in assets.items():
            (output.directory / name).write_bytes(content)
        (output.directory / "config.json").write_text(json.dumps(to_json(config, "float32"), indent=2) + "\n")
