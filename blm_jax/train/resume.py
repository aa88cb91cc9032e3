"""Whether a run goes on as what it was."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from etils import epath

from blm_jax import configfile
from blm_jax.data.files import open_path, write_whole
from blm_jax.errors import RequestError
from blm_jax.recipe import Run

CONFIG = "config.yaml"
# What may be another after a restart: none of it changes which numbers are made.
FREE = ("base", "out", "workers", "hardware", "checkpoints", "evaluation", "log", "model")  # the base is known by its fingerprint
BOUND = ("hardware.compute.dtype",)


def check_config(run: Run) -> None:
    """A run that is in the directory already must be the same one."""
    path = open_path(run.out) / CONFIG
    if path.exists():
        check_same_run(configfile.read(Run, path), run, path)


def keep_config(run: Run) -> None:
    """RUN/config.yaml: every field of the run."""
    path = open_path(run.out) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, configfile.render(run).encode())


def check_same_run(before: Run, now: Run, path: epath.Path) -> None:
    found = _differing(asdict(before), asdict(now))
    changed = [name for name in found if name.partition(".")[0] not in FREE or name in BOUND]
    if changed:
        raise RequestError(f"{path} is of another run: {_listed(changed)} differ; go on with what it says, or choose another out")


def check_same_data(before: Any, now: dict[str, Any], out: str) -> None:
    """The order of all that is read follows from these."""
    changed = _differing(before if isinstance(before, dict) else {}, _plain(now))
    if changed:
        raise RequestError(f"the checkpoints of {out} are of other data: {_listed(changed)} differ; put it back, or choose another out")


def _differing(before: dict[str, Any], now: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for name in sorted({*before, *now}):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differing(one, other, f"{above}{name}.")
        elif one != other:
            found.append(f"{above}{name}")
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
