"""When an answer is right: in the same words, or with numbers that are near enough."""

from __future__ import annotations

import re

import numpy as np

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_right(said: str, answer: str, leeway: float | None) -> bool:
    if leeway is None:
        return plain(said) == plain(answer)
    off = distance(said, answer)
    return off is not None and off <= leeway


def distance(said: str, answer: str) -> float | None:
    """How far the numbers said are from the right ones; None if they are not as many."""
    wanted, found = (np.array([float(number) for number in NUMBER.findall(text)]) for text in (answer, said))
    return float(np.linalg.norm(found - wanted)) if len(found) == len(wanted) > 0 else None


def plain(text: str) -> str:
    return " ".join(text.casefold().strip().removesuffix(".").split())
