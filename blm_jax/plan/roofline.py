"""How long a step takes at least, by what the chips' makers promise.

Products at the chip's peak, and what a device receives at its links' full speed, are bounds that nothing can beat. Memory traffic is an
estimate (`traffic.py`). `at_best` lets all of them happen at once; `as_scheduled` adds what the compiled program waits for while it
computes nothing: the collectives that it starts and ends in one place.
"""

from __future__ import annotations

from typing import NamedTuple

from blm_jax.plan.program import Collective, Counts
from blm_jax.plan.topology import Topology


class Times(NamedTuple):
    """Seconds of one step."""

    compute: float
    memory: float  # an estimate
    links: float  # within a slice
    network: float  # between slices
    waits: float  # part of links and network during which nothing is computed

    @property
    def at_best(self) -> float:
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def as_scheduled(self) -> float:
        return max(self.compute, self.memory, self.links + self.network - self.waits) + self.waits

    @property
    def bound_by(self) -> str:
        return max(("compute", "memory", "links", "network"), key=lambda name: getattr(self, name))


def times(counts: Counts, topology: Topology) -> Times:
    chip = topology.pod.chip
    within = {id(one): seconds(one, topology) for one in counts.collectives}
    return Times(
        compute=counts.operations / (chip.tflops * 1e12),
        memory=counts.traffic / (chip.bandwidth * 1e9),
        links=sum(within[id(one)] for one in counts.collectives if not one.groups.slices),
        network=sum(within[id(one)] for one in counts.collectives if one.groups.slices),
        waits=sum(within[id(one)] for one in counts.collectives if one.waits),
    )


def seconds(one: Collective, topology: Topology) -> float:
    rate = topology.pod.network if one.groups.slices else topology.links(one.groups.sides)
    return one.bytes * one.times / (rate * 1e9)
