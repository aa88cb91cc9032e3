from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blm_jax.config import MeshConfig
from blm_jax.errors import RequestError, RunError
from blm_jax.mesh import make_mesh
from blm_jax.plan.fits import Overflow, compile_for, memory_of, read_overflow
from blm_jax.plan.topology import describe

GIB = 1024**3


@pytest.fixture(scope="module")
def pod() -> Mesh:
    return make_mesh(MeshConfig(1, 4, 1), describe("v5e:2x2").devices)


def lowered(pod: Mesh, gib: float, donated: bool = False) -> jax.stages.Lowered:
    """Doubles an array of so many GiB a chip."""
    given = jax.ShapeDtypeStruct((4, int(gib * GIB / 4)), jnp.float32, sharding=NamedSharding(pod, PartitionSpec("fsdp")))
    return jax.jit(lambda x: x * 2, donate_argnums=0 if donated else ()).lower(given)


def test_memory_of_a_chip(pod: Mesh) -> None:
    compiled = compile_for(lowered(pod, 1), {})
    assert not isinstance(compiled, Overflow)
    memory = memory_of(compiled)
    assert memory.arguments == memory.outputs == GIB
    assert 2 * GIB <= memory.used < 2.1 * GIB and memory.aliased == 0


def test_what_is_donated_counts_once(pod: Mesh) -> None:
    compiled = compile_for(lowered(pod, 1, donated=True), {})
    assert not isinstance(compiled, Overflow)
    assert GIB <= memory_of(compiled).used < 1.1 * GIB


def test_what_does_not_fit_says_how_much_it_needs(pod: Mesh) -> None:
    found = compile_for(lowered(pod, 10), {})
    assert isinstance(found, Overflow)
    assert 20 * GIB <= found.needed < 21 * GIB
    assert 15 * GIB < found.available <= 16 * GIB


def test_both_ways_in_which_the_compiler_says_it() -> None:
    new = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (36.00G) exceeds available HBM "
    new += "(15.75G)."
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.50G hbm. Exceeded hbm capacity by 1.00G."
    assert read_overflow(new) == Overflow(36 * GIB, int(15.75 * GIB))
    assert read_overflow(old) == Overflow(int(16.5 * GIB), int(15.5 * GIB))
    with pytest.raises(RunError, match="not said: RESOURCE_EXHAUSTED: full"):
        read_overflow("RESOURCE_EXHAUSTED: full\nmore")


def test_an_option_that_the_compiler_does_not_know(pod: Mesh) -> None:
    with pytest.raises(RequestError, match="compiler_options: the compiler says No such compile option: 'xla_tpu_faster'"):
        compile_for(lowered(pod, 0.01), {"xla_tpu_faster": "true"})
    with pytest.raises(RequestError, match="xla_tpu_decompose_einsum_reduce_scatter"):
        compile_for(lowered(pod, 0.01), {"xla_tpu_decompose_einsum_reduce_scatter": "perhaps"})


def test_the_cache_of_compiled_programs_is_left_as_it_was(pod: Mesh) -> None:
    before = jax.config.values["jax_enable_compilation_cache"]
    compile_for(lowered(pod, 20), {})
    assert jax.config.values["jax_enable_compilation_cache"] == before
