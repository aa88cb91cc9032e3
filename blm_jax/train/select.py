"""What is trained and what is frozen, by the names of parameters."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from blm_jax.configfile import suggest
from blm_jax.errors import RequestError
from blm_jax.recipe import ModuleConfig
from blm_jax.weights.names import leaves, nested

Tree = dict[str, Any]


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> Tree:
    """Two trees without a leaf in common, as one."""
    return nested({**dict(leaves(one)), **dict(leaves(other))})


def rates(names: Sequence[str], modules: Sequence[ModuleConfig]) -> dict[str, float]:
    """How much of the run's rate each parameter has; 0 is frozen. A pattern that matches nothing is a mistake."""
    found = dict.fromkeys(names, 1.0)
    for module in reversed(modules):
        matched = [name for name in names if fnmatch.fnmatchcase(name, module.match)]
        if not matched:
            near = suggest(module.match.rstrip("*").rstrip("."), {name[: i or None] for name in names for i in _ends(name)})
            raise RequestError(f"optimizer.modules: {module.match!r} matches no parameter{near}; names begin with {_heads(names)}")
        found.update(dict.fromkeys(matched, module.rate))
    return found


def _ends(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."] + [0]


def _heads(names: Sequence[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))


def split(params: Mapping[str, Any], rate_of: Mapping[str, float]) -> tuple[Tree, Tree]:
    """-> what is trained, and what is frozen."""
    flat = dict(leaves(params))
    trained = {path: leaf for path, leaf in flat.items() if rate_of[".".join(path)] > 0}
    if not trained:
        raise RequestError("optimizer.modules freezes every parameter: there is nothing to train")
    return nested(trained), nested({path: leaf for path, leaf in flat.items() if path not in trained})
