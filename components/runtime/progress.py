"""Progress of a stage: a small file that a display reads, and plain lines for a log."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from components.runtime.manifests import Manifest, write_atomically
from dinov2_core.config.frozen import Frozen

logger = logging.getLogger(__name__)

FILE_INTERVAL_SECONDS = 0.3
LINE_INTERVAL_SECONDS = 10.0


class Progress(Frozen):
    """What a stage is doing now."""

    model_config = ConfigDict(extra="ignore")

    stage: str
    """Stage that reports."""
    state: Literal["running", "succeeded", "cached", "failed"] = "running"
    """Whether it runs or how it ended."""
    task: str = ""
    """Part of the stage at work, such as `embedding`."""
    done: int = 0
    """Units done."""
    total: int = 0
    """Units in all; 0 if unknown."""
    unit: str = ""
    """What is counted."""
    rate: float = 0.0
    """Images per second."""
    seconds_left: float = 0.0
    """Estimate for this task."""
    detail: str = ""
    """A few numbers, ready to show."""
    seconds: float = 0.0
    """Time since the stage started."""
    manifest_uri: str = ""
    """Manifest of a stage that is finished."""
    outputs: str = ""
    """Directory, file or address of what it made."""
    numbers: dict[str, float] = Field({})
    """What the manifest has measured."""

    @property
    def line(self) -> str:
        """One plain line for a log."""
        parts = [f"[{self.stage}] {self.task}"]
        if self.total:
            parts.append(f"{self.unit} {self.done}/{self.total}")
        if self.detail:
            parts.append(self.detail)
        if self.rate:
            parts.append(f"{self.rate:.0f} images/s")
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for a log: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Reporter:
    """Writes a stage's progress: often to a file, now and then as a log line."""

    def __init__(self, path: Path | None, *, stage: str) -> None:
        self._path = path
        self._stage = stage
        self._started = time.monotonic()
        self._task = ""
        self._task_started = self._started
        self._task_first = 0
        self._last_file = 0.0
        self._last_line = 0.0

    def __call__(
        self,
        task: str,
        done: int,
        total: int,
        *,
        unit: str = "image",
        rate: float | None = None,
        detail: str = "",
    ) -> None:
        """Report `done` of `total` units of a task; cheap enough to call for every unit."""
        now = time.monotonic()
        if task != self._task:
            self._task, self._task_started, self._task_first = task, now, done
            self._last_file = self._last_line = 0.0
        finished = done == total
        show_line = finished or now - self._last_line >= LINE_INTERVAL_SECONDS
        if not show_line and now - self._last_file < FILE_INTERVAL_SECONDS:
            return
        elapsed = max(now - self._task_started, 1e-6)
        speed = max(done - self._task_first, 0) / elapsed
        if rate is None:
            rate = speed if unit == "image" else 0.0
        progress = Progress(
            stage=self._stage,
            task=task,
            done=done,
            total=total,
            unit=unit,
            rate=rate if elapsed > 0.5 else 0.0,
            seconds_left=(total - done) / speed if speed and elapsed > 0.5 else 0.0,
            detail=detail,
            seconds=now - self._started,
        )
        self._last_file = now
        self._write(progress)
        if show_line:
            self._last_line = now
            logger.info("%s", progress.line)

    def finish(
        self,
        state: Literal["succeeded", "cached", "failed"],
        *,
        detail: str = "",
        manifest: Manifest | None = None,
        manifest_uri: str = "",
    ) -> None:
        """Report how the stage ended; a manifest gives the detail itself."""
        seconds = time.monotonic() - self._started
        detail = manifest.headline if manifest is not None else detail
        self._write(
            Progress(
                stage=self._stage,
                state=state,
                detail=detail,
                seconds=seconds,
                manifest_uri=manifest_uri,
                outputs=manifest.uri if manifest is not None else "",
                numbers=manifest.numbers if manifest is not None else {},
            )
        )
        ended = f"[{self._stage}] {state} after {duration(seconds)}"
        logger.info("%s", f"{ended}: {detail}".replace("\n", "; ") if detail else ended)

    def _write(self, progress: Progress) -> None:
        if self._path is not None:
            write_atomically(self._path, progress.model_dump_json() + "\n")
