"""Applies the settings to student, teacher and optimizer: kernels, sharding, AdamW."""

from __future__ import annotations

import torch
from torch.optim import AdamW

from dinov2_core.config.training import TrainingConfig
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.distributed.sharding import shard_student, shard_teacher
from dinov2_core.training.parameter_groups import parameter_groups
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.training.training_state import start_moments
from dinov2_core.vit.attention_kernels import choose_kernel, use_kernel

ADAM_EPSILON = 1e-8


def shard_student_teacher(model: StudentTeacher, *, ranks: Ranks) -> None:
    """Split student and teacher over the ranks, with the kernels and precision of the settings.

    Raises:
        SettingsError: The named attention kernel does not run on this device in this precision.
    """
    config = model.config
    kernel = choose_kernel(
        config.execution.attention_kernel,
        device=ranks.device,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )
    for network, shard in ((model.student, shard_student), (model.teacher, shard_teacher)):
        use_kernel(network.backbone, kernel)
        shard(
            network.children(),
            blocks=network.backbone.blocks,
            mesh=ranks.mesh,
            precision=config.precision,
            execution=config.execution,
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
