"""step_clock: phases add up, may come again, and cost next to nothing."""

from __future__ import annotations

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dinov2_core.training.step_clock import StepClock

CPU = torch.device("cpu")


def test_a_phase_lasts_until_the_next_and_adds_up() -> None:
    clock = StepClock(CPU)
    for phase, seconds in (("data", 0.02), ("teacher", 0.01), ("student", 0.01), ("teacher", 0.01)):
        clock.enter(phase)  # type: ignore[arg-type]
        clock.enter(phase)  # type: ignore[arg-type]
        time.sleep(seconds)
    seconds = clock.finish().seconds()
    assert list(seconds) == ["data", "teacher", "student"]
    assert seconds["data"] == pytest.approx(0.02, abs=0.01)
    assert seconds["teacher"] == pytest.approx(0.02, abs=0.01)
    assert clock.finish().seconds() == {}


def test_phases_are_ranges_of_a_profile() -> None:
    clock = StepClock(CPU)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        clock.enter("backward")
        clock.enter("optimizer")
        clock.finish()
    assert {"backward", "optimizer"} <= {event.key for event in profiled.key_averages()}


def test_a_step_of_marks_takes_microseconds() -> None:
    clock = StepClock(CPU)
    best = min(_seconds_of_a_step(clock) for _ in range(20))
    assert best < 1e-3


def _seconds_of_a_step(clock: StepClock) -> float:
    started = time.perf_counter()
    for phase in ("data", "teacher", "student", "heads_and_losses", "backward", "optimizer"):
        clock.enter(phase)  # type: ignore[arg-type]
    clock.finish()
    return time.perf_counter() - started


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_phases_on_a_device_lie_between_events() -> None:
    clock = StepClock(torch.device("cuda"))
    values = torch.randn(4096, 4096, device="cuda")
    clock.enter("teacher")
    for _ in range(20):
        values = values @ values
    clock.enter("student")
    assert clock.finish().seconds()["teacher"] > 1e-3
