"""Record: everything that the main rank keeps of a training, none of which a step waits for."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from statistics import fmean
from types import TracebackType
from typing import Self

from components.runtime.periodic_upload import PeriodicUpload
from components.runtime.progress import Reporter
from components.train.health import HealthPage
from components.train.job import Job, places_to_look_at
from components.train.metrics import metrics_of
from components.train.observation import Observer
from components.train.profiling import step_profiler
from components.train.recorder import open_recorder
from dinov2_core.training.step_report import StepReport

logger = logging.getLogger(__name__)

MEAN_STEPS = 50
"""The rate shown is the mean over at most this many last steps."""


class Record:
    """Metrics, progress, health page and profile of a training.

    Use as a context manager: leaving it sends what waits, an open trace included.

    Args:
        job: Settings and places.
        observer: Has the images that are pictured.
        first_step: Step that comes first.
    """

    def __init__(self, job: Job, *, observer: Observer, first_step: int) -> None:
        self._job = job
        self._first_step = first_step
        self._num_steps = job.stage.learning.optimization.num_steps
        self._progress = Reporter(job.progress, stage=job.phase)
        self._page = HealthPage(
            job, pictured=observer.pictured, preprocessing=observer.preprocessing
        )
        self._rates: deque[float] = deque(maxlen=MEAN_STEPS)
        self._signs: dict[str, int] = {}

    def __enter__(self) -> Self:
        job = self._job
        with ExitStack() as stack:
            stack.enter_context(PeriodicUpload(places_to_look_at(job)))
            self._recorder = stack.enter_context(open_recorder(job, first_step=self._first_step))
            self._profiler = stack.enter_context(
                step_profiler(
                    num_steps=job.context.profile_steps,
                    path=job.trace,
                    measures_communication=job.stage.topology.world_size > 1,
                    on_trace=lambda path: self._recorder.do(
                        lambda run: run.log_file(path, folder="profile")
                    ),
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def take(self, steps: Iterator[StepReport], *, observer: Observer) -> None:
        """Take the steps; metrics are safe before the checkpoint that follows them exists."""
        expected = self._first_step
        while True:
            self._profiler.begin()
            report = next(steps, None)
            measured = self._profiler.end()
            if report is None:
                return
            if report.step < expected:
                self._recorder.rewind(report.step)
            expected = report.step + 1
            observation = observer(report)
            metrics = metrics_of(report) | observation.metrics
            metrics |= {f"time/{name}": seconds for name, seconds in measured.items()}
            self._recorder.add(report.step, metrics)
            self._warn(observation.signs, step=report.step)
            self._show(report)
            if report.writes_checkpoint:
                self._recorder.flush()
                self._recorder.do(
                    partial(
                        self._page.refresh,
                        num_steps_done=report.step + 1,
                        patches=observer.patches_of_pictured(),
                        signs=tuple(f"since step {at}: {s}" for s, at in self._signs.items()),
                    )
                )

    def _show(self, report: StepReport) -> None:
        self._rates.append(report.images_per_second)
        loss = f"loss {report.losses['total']:.2f}"
        self._progress(
            "training",
            report.step + 1,
            self._num_steps,
            unit="step",
            rate=fmean(self._rates),
            detail="skipped: not finite" if report.guards.is_skipped else loss,
        )

    def _warn(self, signs: tuple[str, ...], *, step: int) -> None:
        """Warn of a sign when it first shows, not at every step."""
        by_name = {sign.split()[0]: sign for sign in signs}
        for name, sign in by_name.items():
            if not any(known.startswith(name) for known in self._signs):
                logger.warning("step %d: %s; the features may be collapsing", step, sign)
                self._signs[sign] = step
