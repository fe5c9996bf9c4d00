"""profiling: the trace is valid JSON of the asked steps, communication counts overlaps once."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.profiler import record_function

from dinov2_core.training.profiling import StepProfiler, communication_seconds


def take_steps(profiler: StepProfiler, count: int) -> list[dict[str, float]]:
    measured = []
    for step in range(count):
        profiler.begin()
        with record_function(f"step {step}"):
            torch.ones(3).sum()
        measured.append(profiler.end())
    return measured


def names(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


@pytest.mark.parametrize(("taken", "traced"), [(8, {3, 4}), (4, {3})])
def test_a_trace_holds_the_steps_after_the_warmup(
    tmp_path: Path, taken: int, traced: set[int]
) -> None:
    written: list[Path] = []
    path = tmp_path / "trace.json.gz"
    profiler = StepProfiler(
        num_steps=2, path=path, measures_communication=False, on_trace=written.append
    )
    with closing(profiler):
        assert take_steps(profiler, taken) == [{}] * taken
    assert written == [path]
    steps = {name for name in names(path) if name.startswith("step ")}
    assert steps == {f"step {step}" for step in traced}


def test_communication_is_sampled_after_the_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(
        num_steps=0, path=tmp_path / "t", measures_communication=True, on_trace=lambda _: None
    )
    measured = take_steps(profiler, 6)
    assert [set(m) for m in measured] == [set(), set(), set(), {"communication"}, set(), set()]
    assert measured[3]["communication"] == 0.0
    assert not (tmp_path / "t").exists()


def test_overlapping_collectives_count_once() -> None:
    def event(name: str, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=end),
            device_type=DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU,
        )

    events = [
        event("gloo:all_reduce", 0, 10),
        event("gloo:all_gather", 5, 20),
        event("aten::mm", 20, 90),
        event("gloo:all_reduce", 100, 110),
    ]
    profiled = SimpleNamespace(events=lambda: events)
    assert communication_seconds(profiled) == pytest.approx(30e-6)  # type: ignore[arg-type]
