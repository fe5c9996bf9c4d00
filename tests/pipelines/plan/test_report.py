from __future__ import annotations

import json

import pytest
from rich.console import Console
from rich.table import Table

from dinov2_core.planning.step import StepCost
from pipelines.plan.alternatives import Proposal
from pipelines.plan.estimate import ScalingRow, StagePlan
from pipelines.plan.hardware import StepTime
from pipelines.plan.report import plan_json, plan_table, proposals_table, scaling_table

STEP = StepTime(compute=0.25, memory=0.125, communication=0.2, exposed=0.125)
PROPOSAL = Proposal(settings={"a": "[b]", "c": {"d": 2}}, peak_gib=60.0, step_seconds=0.75)
ROW = ScalingRow(
    ranks=1024, images_per_rank=3, peak_gib=20.0, step=STEP, efficiency=0.5, gpu_hours=12_345.0
)
PLAN = StagePlan(
    stage="pretrain",
    ranks=8,
    images_per_rank=4,
    parameters={"backbone": 300_000_000, "dino_head": 40_000_000, "ibot_head": 30_000_000},
    tokens_per_step=2_500_000,
    cost=StepCost(
        peak_bytes=2**30,
        memory_bytes={"activations": 2**30},
        flops={"bfloat16": 10**12},
        moved_bytes=0,
        sent_bytes={},
        calls={},
    ),
    step=STEP,
    num_steps=1000,
    peak_gib=90.0,
    memory_gib=79.0,
    gpu_hours=4.5,
    price=9.0,
    checkpoint_gib=5.5,
    kept_gib=16.5,
    read_gib=100.0,
    proposals=(PROPOSAL,),
    scaling=(ROW,),
)


def text_of(table: Table) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_plan_is_a_table_with_its_warning() -> None:
    text = text_of(plan_table([PLAN], hardware="h100", price=2.0))
    for part in (
        "300.0 M + heads 70.0 M",
        "2.50 M",
        "8.0 T",
        "90.0 of 79 GiB does not fit",
        "0.500 s",
        "0.250 / 0.125 / 0.125 s",
        "9.00",
    ):
        assert part in text
    assert "compiled blocks and packed attention" in " ".join(text.split())


def test_without_a_price_there_is_no_cost() -> None:
    assert "cost" not in text_of(plan_table([PLAN], hardware="h100", price=0.0))


def test_proposals_and_scaling_are_tables() -> None:
    assert "a: [b], c: {d: 2}" in text_of(proposals_table([PROPOSAL], stage="pretrain"))
    assert "devices with more memory" in text_of(proposals_table([], stage="pretrain"))
    text = text_of(scaling_table([ROW], stage="pretrain", memory_gib=19.0))
    assert "20.0 no" in text
    assert "1,024" in text
    assert "50%" in text
    assert "12,345" in text


def test_json_has_the_same_numbers() -> None:
    stage = json.loads(plan_json([PLAN]))["pretrain"]
    assert stage["gpu_hours"] == 4.5
    assert stage["fits"] is False
    assert stage["step_seconds"] == pytest.approx(0.5)
    assert stage["scaling"][0]["step"]["exposed"] == 0.125
