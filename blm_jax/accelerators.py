"""What this machine computes on, found out before jax is imported."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

GOOGLE = "0x1ae0"  # vendor of TPU chips on the PCI bus


def settle_platform() -> None:
    """Say "cpu" where nothing else can be: a libtpu that finds no TPU complains at length."""
    if "JAX_PLATFORMS" not in os.environ and not has_tpu() and _only_libtpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


def has_tpu() -> bool:
    return any(vendor.read_text().strip() == GOOGLE for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def _only_libtpu() -> bool:
    """Whether TPUs are the one accelerator that this JAX was installed for."""
    return bool(find_spec("libtpu")) and not find_spec("jax_plugins") and not entry_points(group="jax_plugins")
