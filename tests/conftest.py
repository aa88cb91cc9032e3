"""Set-up of all tests: a CPU that looks like eight devices, no network, compiled programs kept between runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent

# JAX reads these when it is imported, and processes that tests start inherit them.
assert "jax" not in sys.modules, "something imported jax before tests/conftest.py could set it up"
os.environ["JAX_PLATFORMS"] = "cpu"
# LLVM's optimiser is off: most programs here run once, and compile three times faster so. XLA's own passes are what they are.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Eight devices meet on two cores that others use too: to be late is no deadlock.
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120 --xla_cpu_collective_call_terminate_timeout_seconds=280"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# The TPU compiler, for topologies that are not here: ask no metadata server, and let test processes run side by side.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Examples are drawn from the test's name, not from chance, and none is timed: the first one compiles.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


# What takes minutes begins first, so that nothing long is left to one process in the end.
LONGEST = (
    "train/test_train.py",
    "train/test_step.py",
    "evaluate/world/runs/test_command.py",
    "train/test_fitting.py",
    "models/test_policy.py",
    "infer/test_features.py",
    "models/test_distribution.py",
    "evaluate/world/runs/test_collect.py",
    "models/test_parity.py",
    "infer/test_command.py",
    "infer/test_generate.py",
    "evaluate/world/talk/test_base.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {str(ROOT / "tests" / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew instead of comparing with it")
