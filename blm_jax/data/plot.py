"""Curves as SVG."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

import numpy as np

TALL, EDGE, SIDE = 130, 16, 60  # pixels of a plot's height, and what is left above and below the curves, and for numbers beside them
DOT = 3  # pixels of a radius


class Plot:
    """Curves between two heights, from 0 to a last step."""

    def __init__(self, width: int, low: float, high: float, last: int, tall: int = TALL):
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        self.width, self.low, self.high, self.last, self.tall = width, low, high, last, tall
        self.drawn: list[str] = []

    def curve(self, steps: Sequence[int], values: np.ndarray, look: str) -> None:
        points = list(self._points(steps, values))
        if len(points) == 1:  # a stroke has a length
            points.append((points[0][0] + 2, points[0][1]))
        if points:
            self.drawn.append(f'<polyline {look} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')

    def dots(self, steps: Sequence[int], values: np.ndarray, look: str) -> None:
        self.drawn += [f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"/>' for x, y in self._points(steps, values)]

    def _points(self, steps: Sequence[int], values: np.ndarray) -> Iterator[tuple[float, float]]:
        for x, y in zip(steps, values.tolist(), strict=True):
            if np.isfinite(y):
                yield self.width * x / self.last, EDGE + self.tall * (self.high - y) / (self.high - self.low)

    def figure(self, caption: str, last: str) -> str:
        side, wide, high = self.width + 4, self.width + SIDE, self.tall + 2 * EDGE
        marks = [f'<text x="{side}" y="{EDGE + 4}">{self.high:.4g}</text><text x="{side}" y="{EDGE + self.tall + 4}">{self.low:.4g}</text>']
        marks.append(f'<text x="0" y="{high - 3}">0</text><text x="{self.width}" y="{high - 3}" text-anchor="end">{last}</text>')
        svg = f'<svg viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img">{"".join([*self.drawn, *marks])}</svg>'
        return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
