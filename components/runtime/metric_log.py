"""MetricLog: metrics of a training, first in a file of its directory, then in MLflow."""

from __future__ import annotations

import errno
import os
import sys
import threading
from functools import partial
from pathlib import Path

from mlflow.entities import Metric

from components.runtime.metric_rows import MetricRow, read_rows
from components.runtime.mlflow_requests import ask_mlflow
from components.runtime.retry import ONCE, retrying_with
from components.runtime.storage import delete, download, exists
from components.runtime.tracking import StageRun

REQUEST_METRICS = 900
"""Metrics in one request; the server takes at most 1000."""


class MetricLog:
    """Rows in the order of their steps.

    One thread adds rows and rewinds, another may flush and send at the same time. Adding never
    waits and never fails: rows that cannot be written or sent stay until they can.

    Args:
        path: The file. Its rows of steps before `first_step` are kept, the others removed.
        first_step: Step that is added first.
        marker: Metric of every row, by which the last step that MLflow has is found.
    """

    def __init__(self, path: Path, *, first_step: int, marker: str) -> None:
        self.path = path
        self._marker = marker
        self._first_step = first_step
        self._buffer: list[MetricRow] = []
        self._file_lock = threading.Lock()
        self._size = 0  # of the file, as far as its rows are whole
        self._sent_to = 0  # offset in the file
        self._sent_step: int | None = None  # unknown until MLflow was asked
        self._num_rewinds = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rewind(first_step)

    @property
    def has_unsent_rows(self) -> bool:
        """Whether MLflow lacks rows, as far as is known."""
        return bool(self._buffer) or self._sent_to < self._size

    def add(self, step: int, values: dict[str, float]) -> None:
        """Keep the metrics of one step in memory until the next flush."""
        self._buffer.append(MetricRow.made_now(step, values))

    def rewind(self, step: int) -> None:
        """Remove a step and those after it, which will be taken again.

        MLflow keeps what it has of them and is not sent their new values: it only appends.

        Raises:
            OSError: The file cannot be read or written.
        """
        with self._file_lock:
            self._buffer = [row for row in self._buffer if row.step < step]
            end = 0
            for row, next_offset in read_rows(self.path):
                if row.step >= step:
                    break
                end = next_offset
            if self.path.exists() and self.path.stat().st_size > end:
                os.truncate(self.path, end)
            self._size = end
            self._sent_to = min(self._sent_to, end)
            self._num_rewinds += 1

    def flush(self) -> None:
        """Write rows to the disk.

        Raises:
            OSError: They could not be written, and are kept for the next flush.
        """
        with self._file_lock:
            rows = list(self._buffer)
            if not rows:
                return
            data = b"".join(row.line for row in rows)
            with self.path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if size > self._size:  # a part of rows of which the rest could not be written
                    size = file.truncate(self._size)
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            self._size = size + len(data)
            del self._buffer[: len(rows)]

    def send(self, run: StageRun) -> None:
        """Send the rows on disk that MLflow lacks, whole rows in each request.

        Raises:
            TrackingUnavailable, TrackingRefused: MLflow does not answer, or refuses; what was not
                sent is sent the next time.
        """
        with retrying_with(ONCE):  # rows wait on the disk instead
            self._send(run)

    def _send(self, run: StageRun) -> None:
        if self._sent_step is None:
            self._sent_step = self._last_complete_step(run)
        while True:
            num_rewinds = self._num_rewinds
            metrics, step, end = self._next_request()
            if metrics:
                request = partial(run.client.log_batch, run.run_id, metrics=metrics)
                ask_mlflow(request, uri=run.tracking_uri)
            with self._file_lock:
                self._sent_step = max(self._sent_step, step)
                if self._num_rewinds == num_rewinds:
                    self._sent_to = end
            if not metrics:
                return

    def _last_complete_step(self, run: StageRun) -> int:
        """Last step of which MLflow has all metrics.

        It may have a part of its last step, whose row is sent again if it still exists.
        """
        last = run.last_step(self._marker)
        return last - 1 if last < self._first_step else last

    def _next_request(self) -> tuple[list[Metric], int, int]:
        """Metrics to send now, the last step among them, and the offset in the file after it."""
        metrics: list[Metric] = []
        step, end = -1, self._sent_to
        for row, next_offset in read_rows(self.path, offset=end):
            assert self._sent_step is not None, self.path
            if row.step > self._sent_step:
                if metrics and len(metrics) + len(row.values) > REQUEST_METRICS:
                    break
                metrics += [Metric(k, v, row.time_ms, row.step) for k, v in row.values.items()]
                step = row.step
            end = next_offset
        return metrics, step, end


def leave_note(log: MetricLog) -> None:
    """Leave a file beside a log, or remove it, that says whether MLflow lacks rows."""
    note = Path(_note(str(log.path)))
    if log.has_unsent_rows:
        note.touch()
    else:
        note.unlink(missing_ok=True)


def send_unsent_rows(uri: str, run: StageRun, *, marker: str) -> None:
    """Send what a training that has ended could not send, if there is anything.

    Args:
        uri: Of its log, on any node.
        run: Where the rows belong.
        marker: As for `MetricLog`.
    """
    if exists(_note(uri)):
        MetricLog(download(uri), first_step=sys.maxsize, marker=marker).send(run)
        delete(_note(uri))


def _note(uri: str) -> str:
    return f"{uri}.unsent"
