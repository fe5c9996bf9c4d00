"""The cost of a stage, traced here or in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov2_core.planning.step import trace_step
from pipelines.plan import cost as module
from pipelines.plan.cost import cost_and_time, peak_gib, trace_in_parallel
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


def test_traces_of_other_processes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small_values("s3://bucket/pile")
    spec = load_spec(write_spec(values, tmp_path / "spec.yaml"))
    stages, hardware = [spec.pretrain_stage, spec.finetune_stage], load_hardware("cpu")
    wanted = [cost_and_time(stage, hardware) for stage in stages]
    monkeypatch.setattr(module, "_traced", {})
    monkeypatch.setattr(module, "DEEP", 1)
    trace_in_parallel(stages, hardware)
    assert len(module._traced) == len(stages) or len(os.sched_getaffinity(0)) == 1
    assert [cost_and_time(stage, hardware) for stage in stages] == wanted


def test_shallow_models_are_traced_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml"))
    monkeypatch.setattr(module, "_traced", {})
    trace_in_parallel([spec.pretrain_stage, spec.finetune_stage], load_hardware("cpu"))
    assert module._traced == {}
