"""The reference's processors, as far as they run where torchvision is not."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import transformers.models.qwen2_vl
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata


class GivenVideos:
    """In place of the video processor: it says of each video the grid that stands in for its frames."""

    merge_size = 2
    temporal_patch_size = 2

    def __call__(self, videos: list[list[np.ndarray]], **_: Any) -> dict[str, Any]:
        flat = [video for batch in videos for video in batch]
        grids = np.array([video[0, 0, 0, :3] for video in flat], np.int64)
        metadata = [VideoMetadata(total_num_frames=8, fps=2.0) for _ in flat]
        return {"video_grid_thw": grids, "video_metadata": metadata, "pixel_values_videos": np.zeros((1, 1176), np.float32)}


class Processor(Qwen2_5_VLProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


@functools.cache
def processor(directory: Path) -> Processor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    images = Qwen2VLImageProcessorPil.from_pretrained(directory)
    return Processor(images, tokenizer, GivenVideos(), chat_template=tokenizer.chat_template)


@functools.cache
def video_processor() -> Any:
    """The class Qwen2VLVideoProcessor. Its module wants torchvision for resizing, which these tests do not ask it for."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional"]
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    path = Path(transformers.models.qwen2_vl.__path__[0]) / "video_processing_qwen2_vl.py"
    name = "transformers.models.qwen2_vl.video_processing_for_tests"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules | {name: module}):
        spec.loader.exec_module(module)
    return module.Qwen2VLVideoProcessor
