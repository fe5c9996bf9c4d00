"""The numbers of a step under the names that MLflow shows."""

from __future__ import annotations

import math
from typing import get_args

from dinov2_core.training.step_clock import StepPhase
from dinov2_core.training.step_report import StepReport

TEACHER_NUMBERS = {"teacher_entropy", "prototype_usage"}
"""Reported with the losses; all others are terms of the objective and their total."""
PHASES: tuple[str, ...] = get_args(StepPhase)


def metrics_of(report: StepReport) -> dict[str, float]:
    """Everything about a step; values that are not finite are left out."""
    metrics = {
        **{f"loss/{n}": loss for n, loss in report.losses.items() if n not in TEACHER_NUMBERS},
        "teacher/entropy": report.losses["teacher_entropy"],
        "teacher/prototype_usage": report.losses["prototype_usage"],
        "teacher/momentum": report.schedule.teacher_momentum,
        "teacher/temperature": report.schedule.teacher_temperature,
        **{f"gradient_norm/{name}": norm for name, norm in report.gradient_norms.items()},
        "schedule/learning_rate": report.schedule.learning_rate,
        "schedule/weight_decay": report.schedule.weight_decay,
        "speed/images_per_second": report.images_per_second,
        "speed/step_seconds": report.seconds,
        "speed/data_seconds": report.data_seconds,
        **{f"time/{phase}": seconds for phase, seconds in report.phase_seconds.items()},
        "guards/skipped_steps": float(report.guards.num_skipped),
        "guards/rollbacks": float(report.guards.num_rollbacks),
        "guards/learning_rate_factor": report.guards.learning_rate_factor,
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
