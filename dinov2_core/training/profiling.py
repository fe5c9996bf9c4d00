"""Profiles of whole steps: a trace of the first ones, communication times from samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

WARMUP_STEPS = 3
"""Steps of this process before the trace: the first ones allocate, compile and fill the loader."""
COMMUNICATION_EVERY_STEPS = 500
"""A profiled step takes noticeably longer, so that few are sampled."""
COLLECTIVES = ("gloo:", "nccl:", "nccldevkernel", "ncclkernel")
"""How names of collectives begin in a profile, lower case: gloo's operations and NCCL's kernels.
Their times include the wait for slower ranks."""


class StepProfiler:
    """Profiles some of the steps of this rank.

    `begin` goes before a step and `end` after it. The first steps after the warm-up go to a
    Chrome trace, which Perfetto opens; later one step in so many is profiled alone for the time
    in collectives, which computation hides in part.

    Args:
        num_steps: Steps in the trace; 0 writes none.
        path: Of the trace, ending with .json.gz.
        measures_communication: Whether there are other ranks.
        on_trace: Called with the path once the trace is written.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        path: Path,
        measures_communication: bool,
        on_trace: Callable[[Path], None],
    ) -> None:
        self._num_steps = num_steps
        self._path = path
        self._measures_communication = measures_communication
        self._on_trace = on_trace
        self._num_steps_taken = 0
        self._trace: profile | None = None
        self._sample: profile | None = None

    def begin(self) -> None:
        """Start what is due before the next step."""
        first, taken = WARMUP_STEPS, self._num_steps_taken
        if self._num_steps and taken == first:
            self._trace = _started()
        since = taken - first - self._num_steps
        is_due = since >= 0 and since % COMMUNICATION_EVERY_STEPS == 0
        if self._measures_communication and is_due:
            self._sample = _started()

    def end(self) -> dict[str, float]:
        """Stop what ends with this step.

        Returns:
            `communication` in seconds, if it was sampled.
        """
        self._num_steps_taken += 1
        if self._trace is not None and self._num_steps_taken >= WARMUP_STEPS + self._num_steps:
            self.close()
        if self._sample is None:
            return {}
        sample, self._sample = self._sample, None
        sample.stop()
        return {"communication": communication_seconds(sample)}

    def close(self) -> None:
        """Write the trace of the steps so far, if one is open."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self._path))
        logger.info("trace of training steps: %s; open it at https://ui.perfetto.dev", self._path)
        self._on_trace(self._path)


def communication_seconds(finished: profile) -> float:
    """Time in which at least one collective of this rank was running; overlaps count once."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in finished.events() or ()  # type: ignore[no-untyped-call]
        if event.name.lower().startswith(COLLECTIVES)
        and (event.device_type == DeviceType.CUDA) == torch.cuda.is_available()
    )
    microseconds, reached = 0.0, float("-inf")
    for start, end in spans:
        microseconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return microseconds / 1e6


def _started() -> profile:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    started = profile(activities=activities)
    started.start()
    return started
