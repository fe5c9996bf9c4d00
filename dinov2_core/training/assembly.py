"""Puts student, teacher and optimizer together as the settings say: kernels, sharding, AdamW."""

from __future__ import annotations

import torch
from torch.optim import AdamW

from dinov2_core.config.training import TrainingConfig
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.distributed.sharding import Sharding, shard_averaged, shard_trained
from dinov2_core.training.parameter_groups import parameter_groups
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.training.training_state import start_moments
from dinov2_core.vit.attention_kernels import choose_kernel, use_kernel

ADAM_EPSILON = 1e-8


def shard_student_teacher(model: StudentTeacher, *, ranks: Ranks) -> None:
    """Split student and teacher over the ranks and run them as the settings say.

    Raises:
        SettingsError: The named attention kernel does not run on this device in this precision.
    """
    execution = model.config.execution
    sharding = Sharding(
        precision=model.config.precision,
        recomputes_activations=execution.recomputes_activations,
        compiles_blocks=execution.compiles_blocks,
    )
    student, teacher = model.student, model.teacher
    kernel = choose_kernel(
        execution.attention_kernel,
        device=ranks.device,
        dtype=torch.bfloat16 if model.config.precision == "bf16" else torch.float32,
    )
    use_kernel(student.backbone, kernel)
    use_kernel(teacher.backbone, kernel)
    shard_trained(
        student.children(), blocks=student.backbone.blocks, mesh=ranks.mesh, sharding=sharding
    )
    shard_averaged(
        teacher.children(), blocks=teacher.backbone.blocks, mesh=ranks.mesh, sharding=sharding
    )


def adamw(model: StudentTeacher, *, config: TrainingConfig) -> AdamW:
    """AdamW over the student's parameters, learning rates left to the schedule."""
    optimizer = AdamW(
        parameter_groups(model.student, optimization=config.optimization),
        betas=config.optimization.adam_betas,
        eps=ADAM_EPSILON,
        fused=True,
    )
    start_moments(optimizer)
    return optimizer
