"""What a step says of itself, and the error that stops a run before its weights are spoilt."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dinov2_core.distributed.mesh import Ranks
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.student_teacher import Losses

LOSS_NAMES = tuple(field.name for field in fields(Losses))


class NonFiniteLoss(Exception):
    """A loss or gradient norm is not a number; raised on every rank before the weights change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, the same on every rank but for the times."""

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


def agree_on_numbers(
    losses: Losses, *, norms: dict[str, Tensor], must_stop: bool, step: int, ranks: Ranks
) -> StepNumbers:
    """Exchange losses and the wish to stop; the step's one wait for the device. Collective.

    Args:
        losses: Of this rank.
        norms: Gradient norms, already those of all ranks.
        must_stop: Whether this rank was asked to stop.
        step: For the message.
        ranks: Who takes part.

    Returns:
        The same numbers on every rank.

    Raises:
        NonFiniteLoss: On every rank if any number of any rank is not finite.
    """
    own = [getattr(losses, name).detach().float() for name in LOSS_NAMES]
    wish = own[0].new_tensor(float(must_stop))
    row = torch.stack([*own, *(norm.float() for norm in norms.values()), wish])
    rows: list[list[float]] = ranks.gather(row).tolist()
    names = [*LOSS_NAMES, *(f"gradient norm of {name}" for name in norms)]
    _refuse_non_finite(rows, names=names, step=step)
    num_losses, num_ranks = len(LOSS_NAMES), len(rows)
    means = [sum(values) / num_ranks for values in zip(*rows, strict=True)]
    return StepNumbers(
        losses=dict(zip(LOSS_NAMES, means[:num_losses], strict=True)),
        gradient_norms=dict(zip(norms, means[num_losses:-1], strict=True)),
        must_stop=any(values[-1] > 0 for values in rows),
    )


def _refuse_non_finite(rows: list[list[float]], *, names: list[str], step: int) -> None:
    problems = [
        f"{name} is {value} on rank {rank}"
        for rank, values in enumerate(rows)
        for name, value in zip(names, values, strict=False)
        if not abs(value) < float("inf")
    ]
    if problems:
        raise NonFiniteLoss(
            f"step {step}: {'; '.join(problems)}; the weights are those of the step before, lower "
            "optimization.base_learning_rate or continue from the last checkpoint"
        )
