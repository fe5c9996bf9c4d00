"""plan_cost: a stage's own settings and ranks are what is traced and timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_core.planning.step import trace_step
from pipelines.plan.cost import cost_and_time, peak_gib
from pipelines.plan.hardware import GIB, load_hardware, step_time
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import small_values, write_spec


def test_a_stage_costs_what_a_step_of_its_ranks_does(tmp_path: Path) -> None:
    topology = {"processes_per_node": 4, "num_replicas": 2}
    values = small_values("s3://bucket/pile", pretrain__topology=topology)
    stage = load_spec(write_spec(values, tmp_path / "spec.yaml")).pretrain_stage
    hardware = load_hardware("h200")
    cost, time = cost_and_time(stage, hardware)
    assert cost == trace_step(stage.learning, world_size=4, num_replicas=2, kind="cuda")
    assert time == step_time(cost, hardware, world_size=4, num_replicas=2)
    assert peak_gib(cost, hardware) == pytest.approx(
        cost.peak_bytes / GIB + hardware.reserved_gib, abs=0
    )
