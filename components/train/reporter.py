"""TrainingReporter: everything that the main rank reports of a training."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import ExitStack
from functools import partial
from statistics import fmean
from types import TracebackType
from typing import Self

from torch import Tensor

from components.runtime.metric_log import MetricLog
from components.runtime.periodic_upload import PeriodicUpload
from components.runtime.progress import Reporter
from components.runtime.tracking import StageRun, Tracker
from components.train.background import BackgroundWork
from components.train.health import HealthPage
from components.train.job import MARKER, Job, report_uris
from components.train.metrics import metrics_of
from dinov2_core.training.profiling import StepProfiler
from dinov2_core.training.step_report import StepReport
from dinov2_core.training.teacher_monitor import Measurement, TeacherMonitor

logger = logging.getLogger(__name__)

MEAN_STEPS = 50
"""The rate shown is the mean over at most this many last steps."""


class TrainingReporter:
    """Metrics, progress, health page and profile of a training; no step waits for them.

    Use as a context manager: leaving it writes and sends what is left, an open trace included.

    Args:
        job: Settings and paths.
        monitor: Has the images of the health page.
        first_step: Step that comes first.
    """

    def __init__(self, job: Job, *, monitor: TeacherMonitor, first_step: int) -> None:
        self._job = job
        self._next_step = first_step
        self._interval_steps = job.stage.metric_interval_steps
        self._progress = Reporter(job.progress, stage=job.stage_name)
        self._log = MetricLog(job.metrics, first_step=first_step, marker=MARKER)
        self._background = BackgroundWork(
            self._log, open_run=lambda: Tracker(job.context).open(job.mlflow_run_id)
        )
        self._page = HealthPage(
            job, images=monitor.displayed_images, preprocessing=monitor.preprocessing
        )
        self._profiler = StepProfiler(
            num_steps=job.context.profile_steps,
            path=job.trace,
            measures_communication=job.stage.topology.world_size > 1,
            on_trace=lambda path: self._background.upload(
                path.name, lambda run: run.log_file(path, folder="profile")
            ),
        )
        self._profiled: dict[str, float] = {}
        self._rates: deque[float] = deque(maxlen=MEAN_STEPS)
        self._warnings: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._interval_steps > 1:
            logger.info("metrics have a row every %d steps (log_every_steps)", self._interval_steps)
        if self._job.weights_report.exists():
            self._background.upload(self._job.weights_report.name, self._log_weights_report)
        with ExitStack() as stack:
            stack.enter_context(PeriodicUpload(report_uris(self._job)))
            stack.enter_context(self._background)
            stack.callback(self._profiler.close)
            self._stack = stack.pop_all()
        self._profiler.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def end_profile(self) -> None:
        """End the profile of a step, before anything else is done after it."""
        self._profiled = self._profiler.end()

    def record(
        self, report: StepReport, *, measurement: Measurement, patch_tokens: Tensor | None
    ) -> None:
        """Report a step; its metrics are on disk before the checkpoint that follows it exists.

        Args:
            report: Of the step.
            measurement: What was measured after it.
            patch_tokens: Of the images of the health page [n, N, D], where a checkpoint follows.
        """
        is_retaken = report.step < self._next_step
        if is_retaken:
            self._background.rewind(report.step)
        self._next_step = report.step + 1
        has_warned = self._warn(measurement.warnings, step=report.step)
        measured = measurement.metrics | {f"time/{k}": v for k, v in self._profiled.items()}
        has_event = is_retaken or has_warned or report.guards.is_skipped or report.writes_checkpoint
        if has_event or measured or report.step % self._interval_steps == 0:
            self._log.add(report.step, metrics_of(report) | measured)
        self._background.attempt("writing the progress", lambda: self._show(report))
        if patch_tokens is not None:
            self._background.flush()
            self._background.run(
                partial(
                    self._page.refresh,
                    upload=self._background.upload,
                    num_steps_done=report.step + 1,
                    patch_tokens=patch_tokens,
                    warnings=tuple(self._warnings.values()),
                )
            )
        self._profiler.begin()

    def _show(self, report: StepReport) -> None:
        self._rates.append(report.images_per_second)
        loss = f"loss {report.losses['total']:.2f}"
        self._progress(
            "training",
            report.step + 1,
            self._job.stage.learning.optimization.num_steps,
            unit="step",
            rate=fmean(self._rates),
            detail="skipped: not finite" if report.guards.is_skipped else loss,
        )

    def _warn(self, warnings: tuple[str, ...], *, step: int) -> bool:
        """Log a warning when its indicator first crosses the threshold; whether one was logged."""
        new = {w.split()[0]: w for w in warnings if w.split()[0] not in self._warnings}
        for name, warning in new.items():
            logger.warning("step %d: %s; the features may be collapsing", step, warning)
            self._warnings[name] = f"since step {step}: {warning}"
        return bool(new)

    def _log_weights_report(self, run: StageRun) -> None:
        """Log what the starting weights filled: the whole text, and its first line as a tag."""
        text = self._job.weights_report.read_text(encoding="utf-8")
        run.log_text(self._job.weights_report.name, text)
        run.set_tags({"dinopipe.starting_weights": text.partition("\n")[0]})
