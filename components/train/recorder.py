"""Metrics of the main rank: kept at once, sent to MLflow by a thread that no step waits for."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from components.runtime.metric_spool import MetricSpool
from components.runtime.tracking import StageRun, Tracker
from components.train.job import Job

logger = logging.getLogger(__name__)

SEND_INTERVAL_SECONDS = 3.0
PATIENCE_SECONDS = 60.0
"""Longest wait for the thread: a request to a dead server gives up sooner than that."""


MARKER = "schedule/learning_rate"
"""Metric by which the last step that MLflow has is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    step: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Rewind:
    step: int


@dataclass(frozen=True, slots=True)
class _Task:
    work: Callable[[StageRun], None]


@dataclass(frozen=True, slots=True)
class _Flush:
    done: threading.Event = field(default_factory=threading.Event)


class MetricRecorder:
    """Hands rows to a thread that owns the spool.

    Use as a context manager: leaving it sends what waits.
    """

    def __init__(self, spool: MetricSpool, run: StageRun) -> None:
        self._spool = spool
        self._run = run
        self._inbox: queue.SimpleQueue[_Row | _Rewind | _Task | _Flush | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=PATIENCE_SECONDS)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Keep the metrics of one step; returns at once."""
        self._inbox.put(_Row(step=step, values=values))

    def rewind(self, step: int) -> None:
        """Forget a step and those after it: the run went back; returns at once."""
        self._inbox.put(_Rewind(step))

    def do(self, work: Callable[[StageRun], None]) -> None:
        """Let the thread do some work with the run, after what was added; returns at once.

        An error in it is logged and stops nothing.
        """
        self._inbox.put(_Task(work))

    def flush(self) -> None:
        """Wait until every row so far is on disk, and sent if the server answers."""
        request = _Flush()
        self._inbox.put(request)
        if not request.done.wait(timeout=PATIENCE_SECONDS):
            logger.warning("metrics are not on disk after %.0f s", PATIENCE_SECONDS)

    def _work(self) -> None:
        failures = 0
        while True:
            try:
                item = self._inbox.get(timeout=SEND_INTERVAL_SECONDS)
            except queue.Empty:
                item = _Flush()
            match item:
                case _Row(step=step, values=values):
                    self._spool.add(step, values)
                case _Rewind(step=step):
                    self._spool.rewind(step)
                case _Task(work=work):
                    self._do(work)
                case _Flush(done=done):
                    self._spool.flush()
                    done.set()
                case None:
                    if not self._spool.close():
                        logger.warning("the tracking server did not take the last metrics")
                    return
            if self._spool.failures > failures:
                failures = self._spool.failures
                logger.warning("the tracking server does not answer; metrics wait on disk")

    def _do(self, work: Callable[[StageRun], None]) -> None:
        try:
            work(self._run)
        except Exception:  # pictures of a training are not worth the training
            logger.warning("a report of the training was not written", exc_info=True)


def open_recorder(job: Job, *, first_step: int) -> MetricRecorder:
    """A recorder into the job's MLflow run that goes on before a given step."""
    run = Tracker(job.context).open(job.mlflow_run_id)
    spool = MetricSpool(job.metrics, run, first_step=first_step, marker=MARKER)
    recorder = MetricRecorder(spool, run)
    if job.starting_report.exists():
        recorder.do(partial(_log_starting_report, path=job.starting_report))
    return recorder


def _log_starting_report(run: StageRun, *, path: Path) -> None:
    """Log what became of the starting weights: the whole text, and its first line as a tag."""
    text = path.read_text(encoding="utf-8")
    run.log_text(path.name, text)
    run.set_tags({"dinopipe.starting_weights": text.partition("\n")[0]})
