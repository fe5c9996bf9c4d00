"""BackgroundWork: what no step of a training waits for, in one thread of the main rank."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from components.runtime.metric_log import MetricLog, leave_note
from components.runtime.retry import ONCE, retrying_with
from components.runtime.tracking import StageRun
from dinov2_core.errors import TransientError, message_of, shows_traceback

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 3.0
LONGEST_PAUSE_SECONDS = 60.0
"""Between two attempts to reach MLflow; the first pause is one interval, and each next doubles."""
CLOSE_SECONDS = 60.0
"""Longest wait for the thread at the end of a training; a request may hang."""

_WRITING, _SENDING, _REPORTING = "writing metrics", "sending to MLflow", "the health page"
_THREAD = "the thread that sends to MLflow"


class BackgroundWork:
    """Writes metrics to the disk, sends them and artifacts to MLflow, and runs other tasks.

    Use as a context manager: leaving it does what is left, as far as MLflow answers; the rest of
    the metrics stays in the log's file. An error stops nothing and is logged once, until the same
    thing works again.

    Args:
        log: Metrics of the training.
        open_run: Connects to the MLflow run; called until it succeeds.
        interval_seconds: Longest time that metrics wait in memory.
        close_seconds: Longest wait for the thread at the end.
    """

    def __init__(
        self,
        log: MetricLog,
        *,
        open_run: Callable[[], StageRun],
        interval_seconds: float = INTERVAL_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        self._log = log
        self._open_run = open_run
        self._interval_seconds = interval_seconds
        self._close_seconds = close_seconds
        self._run: StageRun | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._uploads: dict[str, Callable[[StageRun], None]] = {}
        self._closing = threading.Event()
        self._failing: set[str] = set()
        self._pause_seconds = self._interval_seconds
        self._next_attempt = 0.0
        self._thread = threading.Thread(target=self._repeat, name="background", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(timeout=self._close_seconds)
        self.flush()
        self.attempt(_WRITING, lambda: leave_note(self._log))
        if self._log.has_unsent_rows:
            logger.warning(
                "the last metrics are not in MLflow; %s keeps them, and the next run of this stage "
                "sends them",
                self._log.path,
            )

    def run(self, task: Callable[[], None]) -> None:
        """Let the thread do something that needs no MLflow; returns at once."""
        self._tasks.put(task)

    def upload(self, name: str, log: Callable[[StageRun], None]) -> None:
        """Let the thread log an artifact as soon as MLflow answers; replaces one of that name."""
        self._uploads[name] = log

    def flush(self) -> None:
        """Write metrics to the disk, whatever the thread is doing."""
        self.attempt(_WRITING, self._log.flush)
        has_ended = not self._thread.is_alive() and not self._closing.is_set()
        if has_ended and _THREAD not in self._failing:
            self._failing.add(_THREAD)
            logger.error("%s has ended; metrics are kept in %s alone", _THREAD, self._log.path)

    def rewind(self, step: int) -> None:
        """Remove a step and those after it from the log."""
        self.attempt(_WRITING, lambda: self._log.rewind(step))

    def attempt(self, activity: str, work: Callable[[], None]) -> bool:
        """Do something now that may fail; a failure is logged unless the one before failed too.

        Args:
            activity: What is done, for the log.
            work: Does it.

        Returns:
            Whether it succeeded.
        """
        try:
            work()
        except Exception as error:
            if activity not in self._failing:
                self._failing.add(activity)
                logger.warning(
                    "%s failed: %s; training goes on, and it is tried again",
                    activity,
                    self._reason(error),
                    exc_info=shows_traceback(error) and not isinstance(error, OSError),
                )
            return False
        if activity in self._failing:
            self._failing.discard(activity)
            logger.info("%s works again", activity)
        return True

    def _repeat(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            self._do_all()
        self._next_attempt = 0.0
        self._do_all()

    def _do_all(self) -> None:
        self.attempt(_WRITING, self._log.flush)
        while not self._tasks.empty():
            self.attempt(_REPORTING, self._tasks.get())
        if time.monotonic() < self._next_attempt:
            return
        if self.attempt(_SENDING, self._send):
            self._pause_seconds = self._interval_seconds
        else:
            self._next_attempt = time.monotonic() + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def _send(self) -> None:
        with retrying_with(ONCE):
            if self._run is None:
                self._run = self._open_run()
            self._log.send(self._run)
            for name in list(self._uploads):
                log = self._uploads.pop(name)
                try:
                    log(self._run)
                except TransientError:
                    self._uploads.setdefault(name, log)
                    raise

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, OSError):
            return message_of(error)
        directory = self._log.path.parent
        try:
            free = shutil.disk_usage(directory).free
        except OSError:
            return f"{message_of(error)}; {directory} cannot be found"
        return f"{message_of(error)}; {directory} has {free / 2**20:,.0f} MiB of free space"
