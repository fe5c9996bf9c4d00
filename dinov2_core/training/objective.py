"""The objective: its terms as the settings weigh them, the teacher's targets, the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import assert_never

import torch
from torch import Tensor

from dinov2_core.config.objectives import (
    Centering,
    Head,
    Objectives,
    SinkhornKnopp,
    SoftmaxCentering,
)
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.losses.dino import dino_loss
from dinov2_core.losses.ibot import ibot_loss
from dinov2_core.losses.koleo import koleo_of_crops
from dinov2_core.losses.prototypes import Assignments, assignment_health
from dinov2_core.losses.sinkhorn import SinkhornTargets
from dinov2_core.losses.terms import CoupledTerm, LossTerm, MeanTerm, absent_term


def loss_terms(settings: Objectives) -> tuple[LossTerm, ...]:
    """Every term of the objective, in the order in which they are added; the one list of them.

    A new term is a function in `losses`, its settings in `config.objectives` and an entry here.
    """
    temperature = settings.student_temperature
    dino = partial(dino_loss, student_temperature=temperature)
    ibot = partial(ibot_loss, student_temperature=temperature)
    koleo: LossTerm = absent_term("koleo")
    if settings.koleo is not None:
        spread = partial(koleo_of_crops, neighbours=settings.koleo.neighbours)
        koleo = CoupledTerm(weight=settings.koleo.weight, losses=spread)
    return (
        MeanTerm(weight=settings.dino.weight, losses=dino),
        koleo,
        MeanTerm(weight=settings.ibot.weight, losses=ibot),
    )


def target_assignment(centering: Centering, *, head: Head) -> SinkhornTargets | CenteredTargets:
    """What turns a teacher head's scores into targets."""
    match centering:
        case SinkhornKnopp(num_iterations=num_iterations):
            return SinkhornTargets(num_iterations=num_iterations)
        case SoftmaxCentering(momentum=momentum):
            return CenteredTargets(num_prototypes=head.num_prototypes, momentum=momentum)
        case _:
            assert_never(centering)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTargets:
    """What the student is asked to predict."""

    cls: Assignments
    """Of the 2B global crops."""
    patches: Assignments
    """Of the M masked patches; 0 for rows that only pad."""

    def split(self, parts: Sequence[PretrainBatch]) -> list[TeacherTargets]:
        """The targets of each part of the batch that they were made for."""
        cls = self.cls.split([part.global_crops.shape[0] for part in parts])
        patches = self.patches.split([part.masked_indices.shape[0] for part in parts])
        return [
            TeacherTargets(cls=own_cls, patches=own_patches)
            for own_cls, own_patches in zip(cls, patches, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The objective of one batch on this rank; scalars float32 without graph."""

    total: Tensor
    """Sum of the terms."""
    terms: dict[str, Tensor]
    """Weighted, by name: dino_local and dino_global of the local and global crops; ibot and koleo,
    of which the reference logs half."""
    teacher_entropy: Tensor
    """Mean entropy of the teacher's cls targets, nats."""
    prototype_usage: Tensor
    """Distinct best prototypes per cls token of the teacher, in (0, 1]."""

    def by_name(self) -> dict[str, Tensor]:
        """All numbers under the names they are reported under."""
        return {
            "total": self.total,
            **self.terms,
            "teacher_entropy": self.teacher_entropy,
            "prototype_usage": self.prototype_usage,
        }


def losses_of(terms: dict[str, Tensor], *, targets: TeacherTargets) -> Losses:
    """The losses of a batch from its weighted terms and its targets."""
    health = assignment_health(targets.cls)
    return Losses(
        total=reduce(torch.add, terms.values()),
        terms=terms,
        teacher_entropy=health.entropy,
        prototype_usage=health.usage,
    )
