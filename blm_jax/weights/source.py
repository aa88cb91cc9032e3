"""A MODEL directory of any form, opened: of the Hub's layout, a checkpoint, a training checkpoint, a run."""

from __future__ import annotations

import os

from etils import epath

from blm_jax.config import BackboneConfig
from blm_jax.data.files import open_path
from blm_jax.errors import RequestError
from blm_jax.weights.checkpoint import ASSETS, CheckpointSource, is_checkpoint
from blm_jax.weights.checkpoint import read_config as checkpoint_config
from blm_jax.weights.config_json import from_json, read_config_json
from blm_jax.weights.form import Source
from blm_jax.weights.hub import HubSource
from blm_jax.weights.trained import TrainedSource, is_trained, newest_of_run

PathLike = str | os.PathLike[str]


def open_source(path: PathLike, backbone: PathLike | None = None) -> Source:
    """`backbone` is where the frozen weights of a training checkpoint lie now, if they have been moved."""
    directory = _directory(path)
    if is_trained(directory):
        return TrainedSource.open(directory, None if backbone is None else os.fspath(backbone), open_source)
    if backbone is not None:
        raise RequestError(f"--backbone {backbone}: {path} is no training checkpoint, it holds all of its weights; leave it out")
    return CheckpointSource.open(directory) if is_checkpoint(directory) else HubSource.open(directory)


def read_config(path: PathLike) -> BackboneConfig:
    """The config of a MODEL of any form."""
    directory = _directory(path)
    if is_checkpoint(directory):
        return checkpoint_config(directory)
    return from_json(read_config_json(directory), str(directory / "config.json"))


def assets_dir(path: PathLike) -> epath.Path:
    """Where config.json, the tokenizer's files and the like of a MODEL lie."""
    directory = _directory(path)
    return directory / ASSETS if is_checkpoint(directory) else directory


def _directory(path: PathLike) -> epath.Path:
    directory = open_path(path)
    if not directory.is_dir():
        raise RequestError(f"{path} is not a directory; MODEL is a Hugging Face directory or a checkpoint")
    return newest_of_run(directory)
