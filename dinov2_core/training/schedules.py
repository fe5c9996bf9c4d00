"""Schedules of a run as pure functions of the step, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dinov2_core.config.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSchedule:
    """Everything that changes from step to step."""

    learning_rate: float
    """Of a parameter with multiplier 1."""
    prototype_learning_rate: float
    """The same for the prototype layers, 0 while they are frozen."""
    weight_decay: float
    """Of a parameter with multiplier 1."""
    teacher_momentum: float
    """Share of the old teacher in the EMA after this step."""
    teacher_temperature: float
    """Divides the teacher's scores."""
    is_backbone_frozen: bool = False
    """Whether only heads learn: the backbone of the student and of the teacher keep every bit."""


def linear_warmup(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Value at a step of num_steps evenly spaced values, the first start and the last end.

    A single step has the value start. Defined for 0 <= step < num_steps.
    """
    if num_steps == 1:
        return start
    return start + step * ((end - start) / (num_steps - 1))


def warmup_cosine(
    step: int,
    *,
    peak: float,
    final: float,
    num_steps: int,
    warmup_steps: int = 0,
) -> float:
    """Linear warm-up from 0 to peak, then half a cosine towards final; final from num_steps on.

    The warm-up ends at the peak and the cosine starts there, so that the peak comes twice.

    Args:
        step: Optimizer step, >= 0.
        peak: Value after the warm-up.
        final: Limit of the cosine, reached exactly at num_steps.
        num_steps: Steps of the run, warm-up included.
        warmup_steps: Steps of the warm-up, at most num_steps.

    Returns:
        The value at the step.
    """
    if step >= num_steps:
        return final
    if step < warmup_steps:
        return linear_warmup(step, start=0.0, end=peak, num_steps=warmup_steps)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def schedule_at(step: int, *, config: TrainingConfig) -> StepSchedule:
    """All scheduled values at an optimizer step, counted from 0.

    Raises:
        ValueError: When the step is negative.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative; steps count from 0")
    optimization, teacher = config.optimization, config.teacher
    learning_rate = warmup_cosine(
        step,
        peak=optimization.peak_learning_rate,
        final=optimization.final_learning_rate,
        num_steps=optimization.num_steps,
        warmup_steps=optimization.warmup_steps,
    )
    is_frozen = step < optimization.freeze_prototypes_steps
    is_head_warmup = config.head_warmup is not None and step < config.head_warmup.num_steps
    teacher_temperature = teacher.temperature
    if step < teacher.temperature_warmup_steps:
        teacher_temperature = linear_warmup(
            step,
            start=teacher.warmup_temperature,
            end=teacher.temperature,
            num_steps=teacher.temperature_warmup_steps,
        )
    return StepSchedule(
        learning_rate=learning_rate,
        prototype_learning_rate=0.0 if is_frozen else learning_rate,
        weight_decay=warmup_cosine(
            step,
            peak=optimization.weight_decay,
            final=optimization.final_weight_decay,
            num_steps=optimization.num_steps,
        ),
        teacher_momentum=warmup_cosine(
            step,
            peak=teacher.momentum,
            final=teacher.final_momentum,
            num_steps=optimization.num_steps,
        ),
        teacher_temperature=teacher_temperature,
        is_backbone_frozen=is_head_warmup,
    )
