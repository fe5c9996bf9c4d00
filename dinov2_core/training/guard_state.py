"""GuardState: counts of skipped steps and rollbacks, and the diagnosis of a non-finite step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2_core.config.guards import CollapseWatch, Guards
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.errors import NonFiniteLoss
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.step_report import GuardReport, NonFiniteNumber
from dinov2_core.training.student_teacher import StudentTeacher

NUM_NAMED_IMAGES = 8


class GuardState:
    """Counts of skipped steps and rollbacks; what a checkpoint keeps of them is one tensor.

    Args:
        settings: Limits, and the factor on the learning rate.
    """

    def __init__(self, settings: Guards) -> None:
        self._settings = settings
        self.record: Tensor = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        """[3]: skipped steps, rollbacks, factor on the learning rate; on the CPU."""
        self.num_consecutive = 0
        """Skipped steps in a row; 0 in every checkpoint but that of the last step."""

    @property
    def must_roll_back(self) -> bool:
        """Whether more steps in a row were skipped than the settings allow."""
        return self.num_consecutive > self._settings.max_consecutive_skips

    @property
    def num_rollbacks(self) -> int:
        """Rollbacks so far."""
        return int(self.record[1])

    @property
    def learning_rate_factor(self) -> float:
        """Factor on the scheduled learning rate."""
        return float(self.record[2])

    def count(self, *, is_skipped: bool) -> GuardReport:
        """Count a step."""
        self.num_consecutive = self.num_consecutive + 1 if is_skipped else 0
        self.record[0] += is_skipped
        return GuardReport(
            is_skipped=is_skipped,
            num_skipped=int(self.record[0]),
            num_rollbacks=self.num_rollbacks,
            learning_rate_factor=self.learning_rate_factor,
        )

    def raise_if_exhausted(self, diagnosis: Diagnosis) -> None:
        """Raise when too many steps in a row were skipped and no rollback is left.

        Raises:
            NonFiniteLoss: With the diagnosis and the settings to change.
        """
        if self.must_roll_back and self.num_rollbacks >= self._settings.max_rollbacks:
            raise NonFiniteLoss(
                f"{diagnosis}; steps in a row that were not finite: {self.num_consecutive}, "
                f"rollbacks before: {self.num_rollbacks}; the last checkpoint is "
                "complete: lower optimization.base_learning_rate, leave the images out if they are "
                "at fault, or raise guards.max_consecutive_skips or guards.max_rollbacks",
                diagnosis=diagnosis,
            )

    def lowered(self, schedule: StepSchedule) -> StepSchedule:
        """A step's schedule with the learning rates that rollbacks have lowered."""
        factor = self.learning_rate_factor
        return replace(
            schedule,
            learning_rate=schedule.learning_rate * factor,
            prototype_learning_rate=schedule.prototype_learning_rate * factor,
        )

    def after_rollback(self) -> Tensor:
        """The record to continue with, instead of the checkpoint's."""
        changed = self.record.clone()
        changed[1] += 1
        changed[2] *= self._settings.rollback_learning_rate_factor
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Where numbers stopped being finite, as far as the ranks found out."""

    step: int
    """The step, from 0."""
    numbers: tuple[NonFiniteNumber, ...]
    """Losses and gradient norms by rank; sums over ranks carry one rank's fault to all."""
    findings: tuple[str, ...]
    """Pixels, weights or features that are not finite, by rank."""
    images: dict[int, tuple[str, ...]]
    """Sha256 of the images of the suspected ranks, in the order of the batch."""

    def __str__(self) -> str:
        """One paragraph."""
        numbers = "; ".join(f"{n.name} is {n.value} on rank {n.rank}" for n in self.numbers[:6])
        more = len(self.numbers) - 6
        parts = [f"step {self.step}: {numbers}{f' and {more} more numbers' if more > 0 else ''}"]
        parts += self.findings
        for rank, names in self.images.items():
            rest = len(names) - NUM_NAMED_IMAGES
            tail = f" and {rest} more" if rest > 0 else ""
            parts.append(f"images of rank {rank}: {', '.join(names[:NUM_NAMED_IMAGES])}{tail}")
        return "; ".join(parts)


@torch.no_grad()
def diagnose(
    model: StudentTeacher,
    *,
    step: int,
    numbers: tuple[NonFiniteNumber, ...],
    crops: Tensor,
    names_of: Callable[[int], tuple[str, ...]],
    ranks: Ranks,
) -> Diagnosis:
    """Find where the numbers of a step stopped being finite. Collective.

    Args:
        model: Student and teacher.
        step: The step, from 0.
        numbers: Those that are not finite, of all ranks.
        crops: Global crops [2B, C, H, W] of this rank.
        names_of: Sha256 of the images of a rank; asked of all ranks when none stands out.
        ranks: All of them.
    """
    (features,) = model.teacher.backbone([crops])
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    checks = {
        "weights": all(bool(w.isfinite().all()) for w in weights),
        "pixels of the crops": bool(crops.isfinite().all()),
        "features of the teacher": bool(features.cls.isfinite().all()),
    }
    row = torch.tensor([float(not is_finite) for is_finite in checks.values()])
    table = ranks.gather(row.to(ranks.device)).bool().tolist()  # [world_size, 3]
    found = {
        what: tuple(rank for rank, bad in enumerate(table) if bad[i])
        for i, what in enumerate(checks)
    }
    findings = tuple(
        f"{what} are not finite on rank{'s' * (len(at) > 1)} {', '.join(map(str, at))}"
        for what, at in found.items()
        if at
    )
    suspects = found["pixels of the crops"] or found["features of the teacher"]
    if found["weights"] or not suspects:
        suspects = tuple(range(ranks.world_size))
    images = {rank: names_of(rank) for rank in suspects}
    return Diagnosis(step=step, numbers=numbers, findings=findings, images=images)


def collapse_warnings(
    watch: CollapseWatch, *, step: int, num_prototypes: int, indicators: dict[str, float]
) -> tuple[str, ...]:
    """Warnings of the indicators that crossed their threshold; none in the grace period.

    Args:
        watch: Thresholds.
        step: Of the indicators.
        num_prototypes: K of the cls head.
        indicators: Those known now: effective_rank, teacher_entropy (nats), prototype_usage.
    """
    if step < watch.grace_steps:
        return ()
    prefix = "guards.collapse."
    share = watch.max_teacher_entropy_share
    limits = (
        ("effective_rank", "min_effective_rank", watch.min_effective_rank, 1),
        ("teacher_entropy", "min_teacher_entropy_nats", watch.min_teacher_entropy_nats, 1),
        ("teacher_entropy", "max_teacher_entropy_share", share * math.log(num_prototypes), -1),
        ("prototype_usage", "min_prototype_usage", watch.min_prototype_usage, 1),
    )
    return tuple(
        f"{name} {indicators[name]:.4g} is {'less' if sign > 0 else 'more'} than {limit:.4g} "
        f"({prefix}{setting})"
        for name, setting, limit, sign in limits
        if name in indicators and sign * indicators[name] < sign * limit
    )
