"""Scenes are drawn with LLVM's optimiser, which other tests do without: rays take ten times as long."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import pytest

from blm_jax.evaluate.world.talk import stills


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    compiled = jax.jit(stills.drawn, static_argnames="may_have_arms", compiler_options={"xla_backend_optimization_level": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stills, "_drawn", lambda may_have_arms: functools.partial(compiled, may_have_arms=may_have_arms))
        yield
