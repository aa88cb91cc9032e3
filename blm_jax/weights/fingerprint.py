"""Which weights these are, whatever the files they lie in.

Each tensor of the Hub's layout has the SHA-256 of its bytes there; the fingerprint is the SHA-256 of all of them with
names, dtypes and shapes, in the order of names. Layout, sharding and the split into files do not matter.
"""

from __future__ import annotations

from blm_jax.weights.hashing import fingerprint_of
from blm_jax.weights.source import PathLike, open_source


def fingerprint(path: PathLike, *, backbone: PathLike | None = None, show: bool = False) -> str:
    """Of the backbone in a MODEL directory of any form. Reads all of it, a few pieces at a time."""
    return fingerprint_of(open_source(path, backbone), show=show)
