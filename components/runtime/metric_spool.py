"""Metrics of a training run: first to a local file, then to MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import requests
from mlflow.exceptions import MlflowException

from components.runtime.tracking import StageRun


class MetricSpool:
    """Keeps each step's metrics on disk and sends them, each step once.

    The tracking server may fail for a while without stopping the training: what was not sent
    stays in the file and is sent later. After a restart, steps that were already sent are left
    out, because MLflow appends and never replaces.
    """

    def __init__(self, path: Path, run: StageRun, *, first_step: int, marker: str) -> None:
        self._path = path
        self._run = run
        self._sent = run.last_step(marker)
        self._waiting = [row for row in self._rows() if row[0] < first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._waiting)
        self._waiting = [row for row in self._waiting if row[0] > self._sent]
        self._file = path.open("a", encoding="utf-8")
        self.failures = 0

    def _rows(self) -> list[tuple[int, dict[str, float]]]:
        if not self._path.exists():
            return []
        rows: list[tuple[int, dict[str, float]]] = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                step, values = json.loads(line)
            except ValueError:  # the last line of a killed process
                break
            rows.append((step, values))
        return rows

    def add(self, step: int, values: dict[str, float]) -> None:
        """Keep the metrics of one step."""
        self._file.write(json.dumps((step, values)) + "\n")
        if step > self._sent:
            self._waiting.append((step, values))

    def rewind(self, step: int) -> None:
        """Forget a step and those after it, which will be taken anew.

        Only on disk and among what waits: what MLflow has it keeps, and it is not sent the new
        values of those steps.
        """
        self._file.close()
        kept = [row for row in self._rows() if row[0] < step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(self._path)
        self._waiting = [row for row in self._waiting if row[0] < step]
        self._file = self._path.open("a", encoding="utf-8")

    def flush(self) -> bool:
        """Write to disk and send what waits; whether everything arrived."""
        self._file.flush()
        os.fsync(self._file.fileno())
        rows = list(self._waiting)
        if not rows:
            return True
        try:
            self._run.log_rows(rows)
        except (MlflowException, requests.RequestException):
            self.failures += 1
            return False
        self._sent = rows[-1][0]
        del self._waiting[: len(rows)]
        return True

    def close(self) -> bool:
        """Flush and close the file."""
        arrived = self.flush()
        self._file.close()
        return arrived
