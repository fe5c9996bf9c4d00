"""metric_history: a long training is read once, in bounded memory, and its curves are means."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from components.train.metric_history import MAX_POINTS, MetricHistory

NUM_ROWS = 100_000


def append(path: Path, steps: Iterable[int]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps([s, {"a": float(s), "b": 1.0}, s]) + "\n" for s in steps)


def curve(history: MetricHistory, name: str) -> list[tuple[int, float]]:
    return [(step, row[name]) for step, row in history.rows() if name in row]


def test_a_short_training_keeps_every_point(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = MetricHistory(path)
    history.refresh()
    assert history.rows() == []
    append(path, range(2 * MAX_POINTS))
    history.refresh()
    assert curve(history, "a") == [(s, float(s)) for s in range(2 * MAX_POINTS)]


def test_a_refresh_of_a_long_training_reads_only_new_rows_into_bounded_memory(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, range(NUM_ROWS))
    history = MetricHistory(path)
    history.refresh()
    append(path, range(NUM_ROWS, NUM_ROWS + 5000))
    tracemalloc.start()
    history.refresh()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**17, "5000 rows are more than that"
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"x" * (size - 100))  # but for its end, what was read is not read again
    append(path, [NUM_ROWS + 5000])
    history.refresh()
    assert history.latest == {"a": NUM_ROWS + 5000.0, "b": 1.0}
    points = np.array(curve(history, "a"))
    assert MAX_POINTS < len(points) <= 2 * MAX_POINTS
    assert np.abs(points[:, 0] - points[:, 1]).max() <= 0.5
    assert points[0, 1] < points[-1, 1] <= NUM_ROWS + 5000
    assert np.ptp(np.diff(points[:-1, 1])) == 0, "every point stands for as many rows"


def test_points_are_means_of_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, range(4 * MAX_POINTS))
    history = MetricHistory(path)
    history.refresh()
    every_other = np.arange(0, 4 * MAX_POINTS, 2) + 0.5
    assert [value for _, value in curve(history, "a")] == pytest.approx(every_other)


@pytest.mark.parametrize("num_appended", [0, 1, 5])
def test_rows_that_were_removed_are_forgotten(tmp_path: Path, num_appended: int) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, range(6))
    history = MetricHistory(path)
    history.refresh()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    append(path, range(102, 102 + num_appended))  # longer lines than before
    history.refresh()
    expected = [0, 1, *range(102, 102 + num_appended)]
    assert curve(history, "a") == [(step, float(step)) for step in expected]
    assert history.latest["a"] == expected[-1]
