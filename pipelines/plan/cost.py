"""Cost of a step of a training stage on one rank, traced without data."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

from components.train.config import TrainStage
from dinov2_core.config.training import TrainingConfig
from dinov2_core.planning.step import DEEP, StepCost, trace_step
from pipelines.plan.hardware import GIB, Hardware, StepTime, step_time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What the cost of a step depends on."""

    learning: str
    """JSON of a TrainingConfig."""
    world_size: int
    num_replicas: int
    kind: Literal["cuda", "cpu"]

    @classmethod
    def of(cls, stage: TrainStage, hardware: Hardware) -> _Step:
        topology = stage.topology
        return cls(
            learning=stage.learning.model_dump_json(),
            world_size=topology.world_size,
            num_replicas=topology.num_replicas,
            kind=hardware.kind,
        )

    def trace(self) -> StepCost:
        return trace_step(
            TrainingConfig.model_validate_json(self.learning),
            world_size=self.world_size,
            num_replicas=self.num_replicas,
            kind=self.kind,
        )


_traced: dict[_Step, StepCost] = {}
"""Every step that this process has traced, or had traced."""


def cost_and_time(stage: TrainStage, hardware: Hardware) -> tuple[StepCost, StepTime]:
    """Memory, work and traffic of a step of a stage, and its duration."""
    step, topology = _Step.of(stage, hardware), stage.topology
    if step not in _traced:
        _traced[step] = step.trace()
    time = step_time(
        _traced[step],
        hardware,
        world_size=topology.world_size,
        num_replicas=topology.num_replicas,
    )
    return _traced[step], time


def trace_in_parallel(stages: Iterable[TrainStage], hardware: Hardware) -> None:
    """Trace a step of each stage for `cost_and_time`, each in a process, if that saves time.

    Processes are forked, since importing torch takes longer than most traces.
    """
    stages = list(stages)
    steps = {_Step.of(stage, hardware) for stage in stages} - _traced.keys()
    is_deep = any(stage.learning.backbone.dimensions.depth >= DEEP for stage in stages)
    workers = min(len(steps), len(os.sched_getaffinity(0))) if is_deep else 1
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("fork"), initializer=_ignore_interrupts
    ) as pool:
        _traced.update(zip(steps, pool.map(_Step.trace, steps), strict=True))


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children


def peak_gib(cost: StepCost, hardware: Hardware) -> float:
    """Memory of a rank, with what no tensor holds."""
    return cost.peak_bytes / GIB + hardware.reserved_gib
