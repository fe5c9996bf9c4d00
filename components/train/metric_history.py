"""MetricHistory: curves of a training's metrics in bounded memory, read as their file grows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from components.runtime.metric_rows import MetricRow, read_rows

MAX_POINTS = 400
"""Points of a curve after it was thinned; it has at most twice as many."""


@dataclass(slots=True)
class _Curve:
    """Means over so many neighbouring values each: sums of steps, sums of values, counts."""

    points: list[tuple[float, float, int]] = field(default_factory=list)
    values_per_point: int = 1

    def add(self, step: int, value: float) -> None:
        if self.points and self.points[-1][2] < self.values_per_point:
            self.points.append(_sum((step, value, 1), self.points.pop()))
            return
        if len(self.points) == 2 * MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [_sum(*pair) for pair in pairs]
            self.values_per_point *= 2
        self.points.append((step, value, 1))


@dataclass(slots=True)
class _Read:
    """What was read of a file."""

    curves: defaultdict[str, _Curve] = field(default_factory=lambda: defaultdict(_Curve))
    latest: dict[str, float] = field(default_factory=dict)
    last: tuple[MetricRow, int] | None = None
    """Last row, and where the next one begins."""
    last_offset: int = 0
    """Where that row begins."""


class MetricHistory:
    """All curves of a file and the latest values; a refresh reads only what was appended.

    Args:
        path: File of a `MetricLog`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = _Read()

    @property
    def latest(self) -> dict[str, float]:
        """Last value of every metric."""
        return self._read.latest

    def refresh(self) -> None:
        """Read the rows that were appended; all of them again if rows were removed meanwhile."""
        rows = read_rows(self._path, offset=self._read.last_offset)
        if self._read.last is not None and next(rows, None) != self._read.last:
            self._read = _Read()
            rows = read_rows(self._path)
        read = self._read
        for row, next_offset in rows:
            read.last_offset = read.last[1] if read.last else 0
            read.last = row, next_offset
            read.latest |= row.values
            for name, value in row.values.items():
                read.curves[name].add(row.step, value)

    def rows(self) -> list[tuple[int, dict[str, float]]]:
        """Step and value of every point, by metric; in a long training they are means."""
        return [
            (round(steps / count), {name: values / count})
            for name, curve in self._read.curves.items()
            for steps, values, count in curve.points
        ]


def _sum(a: tuple[float, float, int], b: tuple[float, float, int]) -> tuple[float, float, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
