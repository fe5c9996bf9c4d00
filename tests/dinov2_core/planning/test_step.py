from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2_core.config.training import TrainingConfig
from dinov2_core.distributed.mesh import process_group
from dinov2_core.planning.cost_tracker import CostTracker
from dinov2_core.planning.step import masked_patches, take_step, trace_step
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.student_teacher import StudentTeacher
from tests.dinov2_core.planning.configs import small_config
from tests.dinov2_core.planning.measured_step import real_batch

REPOSITORY = Path(__file__).parents[3]


def measured(config: TrainingConfig, tmp_path: Path) -> int:
    """Bytes that torch's allocator had handed out at most for a real step in a fresh process."""
    settings = tmp_path / "config.json"
    settings.write_text(config.model_dump_json())
    num_masked = str(masked_patches(config, world_size=1))
    done = subprocess.run(
        [sys.executable, "-m", "tests.dinov2_core.planning.measured_step", settings, num_masked],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-2])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recomputes": "full"},
        {"precision": "bf16"},
        {"precision": "bf16", "recomputes": "selective"},
    ],
    ids=["fp32", "fp32 full recomputation", "bf16", "bf16 selective recomputation"],
)
def test_planned_memory_is_within_a_tenth_of_what_the_allocator_gave(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = small_config(**settings)
    planned = trace_step(config, world_size=1, kind="cpu").peak_bytes
    assert planned == pytest.approx(measured(config, tmp_path), rel=0.1)


def test_parameters_teacher_and_moments_are_split_over_the_ranks() -> None:
    config = small_config()
    whole = trace_step(config, world_size=1).memory_bytes
    quarter = trace_step(config, world_size=4).memory_bytes
    for purpose in ("student", "teacher", "optimizer"):
        assert quarter[purpose] == pytest.approx(whole[purpose] / 4, rel=0.02)
    replicated = trace_step(config, world_size=4, num_replicas=2).memory_bytes
    assert replicated["student"] == pytest.approx(whole["student"] / 2, rel=0.02)


def test_recomputation_and_accumulation_save_memory_and_cost_work() -> None:
    plain = trace_step(small_config(), world_size=1)
    recomputed = trace_step(small_config(recomputes="full"), world_size=1)
    accumulated = trace_step(small_config(accumulation_steps=4), world_size=1)
    for other in (recomputed, accumulated):
        assert other.peak_bytes < 0.8 * plain.peak_bytes
        assert sum(other.flops.values()) > 1.1 * sum(plain.flops.values())


def test_a_device_with_fused_attention_holds_less_than_a_cpu() -> None:
    config = small_config(precision="bf16", global_crop_size_pixels=224)
    on_cpu = trace_step(config, world_size=1, kind="cpu").peak_bytes
    assert trace_step(config, world_size=1, kind="cuda").peak_bytes < 0.9 * on_cpu


def test_what_sharding_tries_on_whole_tensors_does_not_count() -> None:
    """DTensor runs an operation of each new form once on whole tensors, to know its result."""
    first, second = (trace_step(small_config(), world_size=8) for _ in range(2))
    assert first == second


def test_sharding_sends_what_its_definition_says() -> None:
    """Blocks are gathered for the student's forward and backward pass and the teacher's, the other
    parts once for each; every gradient is scattered once."""
    config = small_config()
    with torch.device("meta"):
        student = StudentTeacher(config, image_size_pixels=112).student
    whole = 4 * sum(p.numel() for p in student.parameters())
    blocks = 4 * sum(p.numel() for p in student.backbone.blocks.parameters())
    sent = trace_step(config, world_size=4).sent_bytes
    assert sent["all_gather"] == pytest.approx(2 * whole + blocks, rel=0.02)
    assert sent["reduce_scatter"] == pytest.approx(whole, rel=0.02)


def test_flops_equal_those_of_torchs_own_counter() -> None:
    config = small_config(precision="bf16")
    num_masked = masked_patches(config, world_size=1)
    with process_group() as ranks:
        model = build_student_teacher(config, device=ranks.device)
        shard_student_teacher(model, ranks=ranks)
        optimizer = adamw(model, config=config)
        batch = real_batch(config, num_masked=num_masked)
        with FlopCounterMode(display=False) as counter:
            take_step(model, (batch,), optimizer=optimizer, config=config, tracker=CostTracker())
    planned = trace_step(config, world_size=1, kind="cpu", num_masked=num_masked)
    assert sum(planned.flops.values()) == counter.get_total_flops()


def test_masked_patches_are_a_share_of_the_batch_and_more_varied_on_few_crops() -> None:
    config = small_config(global_batch_size=64)
    alone = masked_patches(config, world_size=1)
    assert alone == pytest.approx(2 * 64 * 64 * 0.5 * 0.3, rel=0.02)
    assert masked_patches(config, world_size=16) > 1.5 * alone / 16
