"""What a step says of itself, and the numbers on which all ranks agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dinov2_core.distributed.mesh import Ranks
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.student_teacher import Losses

LOSS_NAMES = tuple(field.name for field in fields(Losses))


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFiniteNumber:
    """A loss or gradient norm that is not a number."""

    name: str
    """Field of `Losses`, or `gradient norm of` a part of the student."""
    value: float
    """NaN or an infinity."""
    rank: int
    """Who has it; the norms are those of all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardReport:
    """What the guards did until after a step."""

    is_skipped: bool
    """This step changed nothing."""
    num_skipped: int
    """Skipped steps of the run."""
    num_rollbacks: int
    """Returns to a checkpoint."""
    learning_rate_factor: float
    """Factor on the scheduled learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step, the same on every rank but for the times."""

    step: int
    """From 0."""
    losses: dict[str, float]
    """Fields of `Losses`, mean over the ranks."""
    gradient_norms: dict[str, float]
    """Before clipping: backbone, dino_head and ibot_head where there is one."""
    schedule: StepSchedule
    """Learning rate, weight decay, teacher momentum and temperature of this step."""
    images_per_second: float
    """Over all ranks, waiting for data included."""
    seconds: float
    """Duration of the step, waiting for data included."""
    data_seconds: float
    """Part of it in which this rank waited for its batch."""
    phase_seconds: dict[str, float]
    """Its phases on this rank, see `StepClock`; empty for steps whose clock is not read."""
    guards: GuardReport
    """Whether the step was skipped, and what was so far; a skipped step's numbers may be NaN."""
    writes_checkpoint: bool
    """Whether a checkpoint follows as soon as the caller asks for the next report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """What all ranks know after a step's backward pass."""

    losses: dict[str, float]
    """Mean over the ranks."""
    gradient_norms: dict[str, float]
    """Of the whole gradient."""
    must_stop: bool
    """Some rank was asked to stop."""
    non_finite: tuple[NonFiniteNumber, ...]
    """Numbers of any rank that are none; with some, the step must change nothing."""


def agree_on_numbers(
    losses: Losses, *, norms: dict[str, Tensor], must_stop: bool, ranks: Ranks
) -> StepNumbers:
    """Exchange losses and the wish to stop; the step's one wait for the device. Collective.

    Args:
        losses: Of this rank.
        norms: Gradient norms, already those of all ranks.
        must_stop: Whether this rank was asked to stop.
        ranks: Who takes part.

    Returns:
        The same numbers on every rank.
    """
    own = [getattr(losses, name).detach().float() for name in LOSS_NAMES]
    wish = own[0].new_tensor(float(must_stop))
    row = torch.stack([*own, *(norm.float() for norm in norms.values()), wish])
    rows: list[list[float]] = ranks.gather(row).tolist()
    names = [*LOSS_NAMES, *(f"gradient norm of {name}" for name in norms)]
    num_losses, num_ranks = len(LOSS_NAMES), len(rows)
    means = [sum(values) / num_ranks for values in zip(*rows, strict=True)]
    return StepNumbers(
        losses=dict(zip(LOSS_NAMES, means[:num_losses], strict=True)),
        gradient_norms=dict(zip(norms, means[num_losses:-1], strict=True)),
        must_stop=any(values[-1] > 0 for values in rows),
        non_finite=tuple(
            NonFiniteNumber(name=name, value=value, rank=rank)
            for rank, values in enumerate(rows)
            for name, value in zip(names, values, strict=False)
            if not math.isfinite(value)
        ),
    )
