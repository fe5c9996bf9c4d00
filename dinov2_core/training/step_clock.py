"""StepClock: the time of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.profiler import record_function

from dinov2_core.training.student_teacher import StudentTeacher

StepPhase = Literal["data", "teacher", "student", "heads_and_losses", "backward", "optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """The beginning of a phase."""

    phase: StepPhase
    at: float | torch.cuda.Event


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The marks of a finished step."""

    marks: tuple[_Mark, ...]
    """Beginnings of its phases, in order."""
    end: float | torch.cuda.Event
    """Of the last phase."""

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; waits until the device has finished the step."""
        seconds: dict[str, float] = {}
        ends = [*(mark.at for mark in self.marks[1:]), self.end]
        for mark, until in zip(self.marks, ends, strict=False):
            seconds[mark.phase] = seconds.get(mark.phase, 0.0) + _between(mark.at, until)
        return seconds


class StepClock:
    """Splits a step into phases; a phase lasts until the next one is entered, and may come again.

    On the CPU the times are the host's. On CUDA they lie between events on the compute stream:
    a phase there includes what the stream waits for, such as gathered parameters or, in `data`,
    the host; the phases of a step add up to its duration either way. The phases are also ranges
    of a profiler's trace. Student and teacher enter theirs through hooks on the backbones:

    - data: waiting for the batch and copying it to the device
    - teacher: backbone, heads and targets (Sinkhorn-Knopp or centre)
    - student: forward pass of the backbone
    - heads_and_losses: the student's heads and all losses, forward
    - backward: backward pass, reduction of gradients included
    - optimizer: clipping, exchange of the numbers between the ranks, AdamW and moving average

    Args:
        device: Where the step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[_Mark] = []
        self._range: record_function | None = None

    def watch(self, model: StudentTeacher) -> None:
        """Enter the phases of the forward pass whenever a backbone is called; once per model."""
        teacher, student = model.teacher.backbone, model.student.backbone
        teacher.register_forward_pre_hook(self._entering("teacher"), prepend=True)
        student.register_forward_pre_hook(self._entering("student"), prepend=True)
        student.register_forward_hook(self._entering("heads_and_losses"))

    def enter(self, phase: StepPhase) -> None:
        """Begin a phase, which ends the one before."""
        if self._marks and self._marks[-1].phase == phase:
            return
        self._leave()
        self._marks.append(_Mark(phase=phase, at=self._now()))
        if torch._C._autograd._profiler_enabled():  # a range costs more than all else here
            self._range = record_function(phase)
            self._range.__enter__()  # type: ignore[no-untyped-call]

    def finish(self) -> StepTimes:
        """End the step; the clock is ready for the next one."""
        self._leave()
        times = StepTimes(marks=tuple(self._marks), end=self._now())
        self._marks = []
        return times

    def _entering(self, phase: StepPhase) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self._marks:  # not for a forward pass outside of a step
                self.enter(phase)

        return hook

    def _leave(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds from one mark to a later one; waits for the device."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float), (start, end)
        return end - start
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000
