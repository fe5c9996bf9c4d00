"""step_report: every rank learns of every number, and of the first that is not finite."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.distributed.mesh import process_group
from dinov2_core.training.step_report import (
    LOSS_NAMES,
    NonFiniteNumber,
    StepNumbers,
    agree_on_numbers,
)
from dinov2_core.training.student_teacher import Losses


def agree(*, must_stop: bool = False, norm: float = 2.0, **changed: float) -> StepNumbers:
    values = {name: float(i) for i, name in enumerate(LOSS_NAMES)} | changed
    losses = Losses(**{name: torch.tensor(value) for name, value in values.items()})
    norms = {"backbone": torch.tensor(norm), "dino_head": torch.tensor(1.0)}
    with process_group() as ranks:
        return agree_on_numbers(losses, norms=norms, must_stop=must_stop, ranks=ranks)


@pytest.mark.parametrize("must_stop", [False, True])
def test_numbers_keep_their_names(must_stop: bool) -> None:
    numbers = agree(must_stop=must_stop)
    assert numbers.losses == {name: float(i) for i, name in enumerate(LOSS_NAMES)}
    assert numbers.gradient_norms == {"backbone": 2.0, "dino_head": 1.0}
    assert numbers.must_stop is must_stop


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_named(value: float) -> None:
    found = agree(ibot=value).non_finite
    assert found == (NonFiniteNumber(name="ibot", value=value, rank=0),)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    (found,) = agree(norm=float("nan")).non_finite
    assert found.name == "gradient norm of backbone"
    assert found.value != found.value


def test_finite_numbers_are_no_problem() -> None:
    assert agree().non_finite == ()
