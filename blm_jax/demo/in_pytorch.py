"""The actions of an export by PyTorch and transformers alone, without JAX: python in_pytorch.py EXPORT INPUTS.npz OUT.npz

INPUTS holds of each observation what the backbone reads, the robot and its state, and the noise that actions are made from.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration


def main(export: str, inputs: str, out: str) -> None:
    backbone: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(export)
    backbone.eval()
    policy, given, found = _policy_of(Path(export) / "policy"), np.load(inputs), {}
    for number, robot in enumerate(given["robots"].tolist()):
        tokens, pixels, grids, noise = (torch.from_numpy(given[f"{number}/{name}"]) for name in ("tokens", "pixels", "grids", "noise"))
        prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels, "image_grid_thw": grids}
        with torch.no_grad():
            intent = policy.intent(backbone, prompt)
            [found[str(number)]] = policy.sample_actions(intent, [robot], [given[f"{number}/state"]], noise=noise)
    arrays: dict[str, Any] = {number: np.asarray(chunk) for number, chunk in found.items()}
    np.savez(out, **arrays)


def _policy_of(directory: Path) -> Any:
    """By the module that lies beside its weights."""
    spec = importlib.util.spec_from_file_location("blm_policy", directory / "blm_policy.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["blm_policy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BLMPolicy.from_pretrained(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
