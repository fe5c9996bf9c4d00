"""Rows of metrics in a file, one line per step; needs no MLflow."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """Metrics of one step; a line of the file, `[step, {name: value}, milliseconds since 1970]`."""

    step: int
    values: dict[str, float]
    time_ms: int
    """When the row was made. MLflow keeps one of two points that are equal in run, metric, step,
    value and time, so that a row may be sent again."""

    @classmethod
    def parsed(cls, line: bytes) -> MetricRow:
        """The row of a line.

        Raises:
            ValueError: The line is no row, such as the last one of a killed process.
        """
        step, values, *times = json.loads(line)
        if not times:  # a row of an earlier version
            return cls.made_now(step, values)
        return cls(step=step, values=values, time_ms=times[0])

    @classmethod
    def made_now(cls, step: int, values: dict[str, float]) -> MetricRow:
        """A row with the present time."""
        return cls(step=step, values=values, time_ms=time.time_ns() // 1_000_000)

    @property
    def line(self) -> bytes:
        """The row as a line of the file."""
        return json.dumps((self.step, self.values, self.time_ms)).encode() + b"\n"


def read_rows(path: Path, *, offset: int = 0) -> Iterator[tuple[MetricRow, int]]:
    """Rows of a file from a byte offset on, each with the offset of the next.

    Ends before a line that is not complete; a file that does not exist has no rows.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                row = MetricRow.parsed(line)
            except (ValueError, TypeError):  # damaged
                return
            yield row, offset


def last_rows(path: Path, count: int) -> list[dict[str, float]]:
    """Values of the last rows, oldest first; fewer where there are fewer."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        lines = deque(file, maxlen=count)
    return [MetricRow.parsed(line).values for line in lines]
