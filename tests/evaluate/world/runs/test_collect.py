"""`blm data collect world`: requests that are refused in a line, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from blm_jax.cli import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise", "nan"], "noise is nan: it must lie between 0 and 0.2 radians"),
        (["--noise", "-0.1"], "noise is -0.1: it must lie between"),
        (["--seed", "-1"], "seed is -1: it must lie between"),
        (["--robots", "pandas"], "did you mean panda?"),
    ],
)
def test_requests_that_cannot_be(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "collect", "world", str(tmp_path / "sets"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
