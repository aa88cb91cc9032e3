"""Whether a program fits the memory of a chip: the compiler says, also of chips that are not here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

from blm_jax.errors import RequestError, RunError


class Memory(NamedTuple):
    """Bytes of one chip's memory while the program runs."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take an argument's place
    temporaries: int  # all room that is set aside for them: with gaps, it may be more than is ever in use
    code: int
    peak: int  # of all but the code, when most is in use

    @property
    def used(self) -> int:
        return self.peak + self.code


class Overflow(NamedTuple):
    """Bytes, as the compiler puts them when it gives up."""

    needed: int
    available: int


def compile_for(lowered: jax.stages.Lowered, options: Mapping[str, str]) -> jax.stages.Compiled | Overflow:
    cache = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent devices cannot be read back
    try:
        return lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            return read_overflow(message)
        unknown = re.search(r"No such compile option: '[^']*'|Failed to parse '[^']*' into flag \w+", message)
        if unknown:
            raise RequestError(f"hardware.compiler_options: the compiler says {unknown[0]}") from error
        raise
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    stats = compiled.memory_analysis()
    if stats is None:
        raise RunError("the compiler does not tell how much memory the program takes")
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_EXCEEDED = (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Used {_SIZE} of {_SIZE} hbm",
)


def read_overflow(message: str) -> Overflow:
    for pattern in _EXCEEDED:
        found = re.search(pattern, message)
        if found:
            return Overflow(_bytes(found[1], found[2]), _bytes(found[3], found[4]))
    raise RunError(f"the program does not fit, but how much it needs is not said: {message.splitlines()[0]}")


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))
