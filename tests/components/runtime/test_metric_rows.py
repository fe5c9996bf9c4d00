"""metric_rows: a row survives its line, and a torn or damaged line ends the reading."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from components.runtime.metric_rows import MetricRow, last_rows, read_rows


def test_a_row_is_its_line_with_the_time_at_which_it_was_made() -> None:
    before = time.time()
    row = MetricRow.made_now(3, {"loss": 0.1})
    assert before - 1 <= row.time_ms / 1000 <= time.time() + 1
    assert MetricRow.parsed(row.line) == row


@pytest.mark.parametrize("torn", [b'[2, {"lo', b'[2, {"loss": 1.0}, 5]', b"\0\0\0\n", b"7\n"])
def test_reading_ends_before_a_line_that_is_not_whole(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [MetricRow(step=step, values={"loss": 1.0}, time_ms=step) for step in range(2)]
    path.write_bytes(rows[0].line + rows[1].line + torn)
    first, second = len(rows[0].line), len(rows[0].line + rows[1].line)
    assert list(read_rows(path)) == [(rows[0], first), (rows[1], second)]
    assert list(read_rows(path, offset=first)) == [(rows[1], second)]
    assert list(read_rows(path, offset=second)) == []


def test_last_rows_are_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_rows(path, 2) == []
    path.write_bytes(b"".join(MetricRow.made_now(i, {"loss": float(i)}).line for i in range(5)))
    assert last_rows(path, 2) == [{"loss": 3.0}, {"loss": 4.0}]
    assert len(last_rows(path, 9)) == 5
