"""What a training stage takes of each of its ranks, by one step without data."""

from __future__ import annotations

import functools

from components.train.config import TrainStage
from dinov2_core.config.training import TrainingConfig
from dinov2_core.planning.step import StepCost, trace_step
from pipelines.plan.hardware import GIB, Hardware, StepTime, step_time


def cost_and_time(stage: TrainStage, hardware: Hardware) -> tuple[StepCost, StepTime]:
    """Memory, work and traffic of a step of a stage, and the time that it takes."""
    topology = stage.topology
    cost = _traced(
        stage.learning.model_dump_json(),
        world_size=topology.world_size,
        num_replicas=topology.num_replicas,
        kind=hardware.kind,
    )
    time = step_time(
        cost, hardware, world_size=topology.world_size, num_replicas=topology.num_replicas
    )
    return cost, time


def peak_gib(cost: StepCost, hardware: Hardware) -> float:
    """Memory of a rank, with what no tensor holds."""
    return cost.peak_bytes / GIB + hardware.reserved_gib


@functools.lru_cache(maxsize=64)
def _traced(learning: str, **ranks: int | str) -> StepCost:
    return trace_step(TrainingConfig.model_validate_json(learning), **ranks)  # type: ignore[arg-type]
