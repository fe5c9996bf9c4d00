"""config: batch, parts and replicas fit the ranks, and metrics have about 10,000 rows at most."""

from __future__ import annotations

import pytest

from components.train.config import Topology, TrainStage
from dinov2_core.config.training import TrainingConfig


def with_parts(learning: TrainingConfig, num_parts: int) -> TrainingConfig:
    optimization = learning.optimization.model_copy(update={"accumulation_steps": num_parts})
    return learning.model_copy(update={"optimization": optimization})


def test_replicas_divide_the_ranks() -> None:
    assert Topology(processes_per_node=4, num_nodes=2, num_replicas=2).world_size == 8
    with pytest.raises(ValueError, match="num_replicas 3 does not divide 8 ranks"):
        Topology(processes_per_node=4, num_nodes=2, num_replicas=3)


def test_ranks_and_parts_divide_the_batch(stage: TrainStage) -> None:
    two = Topology(processes_per_node=2)
    TrainStage(learning=with_parts(stage.learning, 4), topology=two)
    with pytest.raises(ValueError, match=r"global_batch_size 8 is not divisible by 2 ranks x .* 3"):
        TrainStage(learning=with_parts(stage.learning, 3), topology=two)


@pytest.mark.parametrize(
    ("num_steps", "given", "interval"),
    [
        (60, None, 1),
        (19_999, None, 1),
        (20_000, None, 2),
        (125_000, None, 12),
        (625_000, None, 62),
        (60, 7, 7),
        (625_000, 1, 1),
    ],
)
def test_long_trainings_have_about_ten_thousand_rows_of_metrics(
    stage: TrainStage, num_steps: int, given: int | None, interval: int
) -> None:
    optimization = stage.learning.optimization.model_copy(update={"num_steps": num_steps})
    learning = stage.learning.model_copy(update={"optimization": optimization})
    stage = TrainStage(learning=learning, log_every_steps=given)
    assert stage.metric_interval_steps == interval
    assert TrainStage.model_validate_json(stage.model_dump_json()) == stage
    assert ("log_every_steps" in stage.model_dump_json()) == (given is not None)
