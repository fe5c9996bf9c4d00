"""objective: settings weigh the terms, and what they leave out is logged as 0."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.config.objectives import (
    DinoObjective,
    Head,
    IbotObjective,
    KoleoObjective,
    Objectives,
    SharedHead,
    SinkhornKnopp,
    SoftmaxCentering,
)
from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.losses.prototypes import Assignments
from dinov2_core.losses.sinkhorn import SinkhornTargets
from dinov2_core.losses.terms import CoupledTerm, LossInputs, MeanTerm, Predictions
from dinov2_core.training.objective import (
    TeacherTargets,
    loss_terms,
    losses_of,
    target_assignment,
)

SETTINGS = Objectives(
    dino=DinoObjective(weight=2.0, head=Head(num_prototypes=8)),
    ibot=IbotObjective(weight=3.0, head=SharedHead()),
    koleo=KoleoObjective(weight=0.5),
)


def assignments(num_rows: int) -> Assignments:
    return Assignments(
        features=torch.eye(4)[:num_rows],
        prototypes=torch.eye(4),
        temperature=1.0,
        sample_scaling=torch.full((num_rows,), -torch.tensor(4.0).log().item()),
        prototype_scaling=torch.zeros(4),
    )


def make_inputs() -> LossInputs:
    rows = Predictions(features=torch.eye(4)[:2], prototypes=torch.eye(4), targets=assignments(2))
    return LossInputs(
        global_crops=torch.zeros(2, 3, 4, 4),
        cls_tokens=torch.ones(2, 4),
        patch_tokens=torch.ones(2, 1, 4),
        cls=rows,
        patches=rows,
        mask_weights=torch.ones(2),
    )


def names_of(settings: Objectives) -> list[str]:
    inputs = make_inputs()
    return [
        name
        for term in loss_terms(settings)
        for name in (
            term.losses(inputs) if isinstance(term, MeanTerm) else term.losses(inputs.cls_tokens)
        )
    ]


def test_terms_have_the_weights_and_names_of_the_settings() -> None:
    terms = loss_terms(SETTINGS)
    assert [term.weight for term in terms] == [2.0, 0.5, 3.0]
    assert [type(term) for term in terms] == [MeanTerm, CoupledTerm, MeanTerm]
    assert names_of(SETTINGS) == ["dino_local", "dino_global", "koleo", "ibot"]


def test_a_term_that_is_left_out_is_logged_as_0() -> None:
    without = SETTINGS.model_copy(update={"koleo": None})
    assert names_of(without) == names_of(SETTINGS)
    koleo = loss_terms(without)[1]
    assert isinstance(koleo, MeanTerm)
    assert koleo.losses(make_inputs()) == {"koleo": 0}


@pytest.mark.parametrize("temperature", [0.1, 0.2])
def test_the_student_temperature_reaches_both_heads(temperature: float) -> None:
    settings = SETTINGS.model_copy(update={"student_temperature": temperature})
    dino, _, ibot = loss_terms(settings)
    (_, dino_global), (_, patches) = (
        list(term.losses(make_inputs()).items())[-1]  # type: ignore[arg-type]
        for term in (dino, ibot)
    )
    log_sum = (torch.eye(4)[:2] / temperature).logsumexp(dim=1)
    weights = assignments(2).features @ assignments(2).prototypes.T
    targets = (weights + assignments(2).sample_scaling[:, None]).exp()
    same = (log_sum - (targets * torch.eye(4)[:2] / temperature).sum(1)).sum() / 2
    swapped = (log_sum - (targets.flip(0) * torch.eye(4)[:2] / temperature).sum(1)).sum() / 2
    torch.testing.assert_close(patches, same)
    torch.testing.assert_close(dino_global, swapped)


def test_targets_follow_the_centering() -> None:
    head = Head(num_prototypes=8)
    sinkhorn = target_assignment(SinkhornKnopp(num_iterations=5), head=head)
    assert isinstance(sinkhorn, SinkhornTargets)
    assert sinkhorn.num_iterations == 5
    centered = target_assignment(SoftmaxCentering(momentum=0.5), head=head)
    assert isinstance(centered, CenteredTargets)
    assert (centered.momentum, centered.center.shape) == (0.5, (8,))


def test_the_total_is_the_sum_of_all_terms() -> None:
    targets = TeacherTargets(cls=assignments(4), patches=assignments(1))
    terms = {"dino": torch.tensor(1.5), "kde": torch.tensor(-4.0)}
    losses = losses_of(terms, targets=targets)
    assert losses.total == -2.5
    assert list(losses.by_name()) == ["total", "dino", "kde", "teacher_entropy", "prototype_usage"]
    assert losses.prototype_usage == 1
