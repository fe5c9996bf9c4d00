"""step_report: every rank learns every number, and the first that is not finite."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.distributed.mesh import process_group
from dinov2_core.training.objective import Losses
from dinov2_core.training.step_report import NonFiniteNumber, PendingNumbers

TERMS = {"dino_local": 1.0, "ibot": 2.0}


def gathered(*, must_stop: bool = False, norm: float = 2.0, **changed: float) -> PendingNumbers:
    losses = Losses(
        total=torch.tensor(3.0),
        terms={name: torch.tensor(value) for name, value in (TERMS | changed).items()},
        teacher_entropy=torch.tensor(4.0),
        prototype_usage=torch.tensor(0.5),
    )
    norms = {"backbone": torch.tensor(norm), "dino_head": torch.tensor(1.0)}
    with process_group() as ranks:
        return PendingNumbers(losses, norms=norms, must_stop=must_stop, ranks=ranks)


@pytest.mark.parametrize("must_stop", [False, True])
def test_numbers_keep_their_names(must_stop: bool) -> None:
    numbers = gathered(must_stop=must_stop).read()
    expected = {"total": 3.0, **TERMS, "teacher_entropy": 4.0, "prototype_usage": 0.5}
    assert list(numbers.losses.items()) == list(expected.items())
    assert numbers.gradient_norms == {"backbone": 2.0, "dino_head": 1.0}
    assert numbers.must_stop is must_stop


def test_a_term_of_any_name_is_reported() -> None:
    assert gathered(kde=7.0).read().losses["kde"] == 7.0
    assert gathered(kde=float("inf")).read().non_finite[0].name == "kde"


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_named(value: float) -> None:
    pending = gathered(ibot=value)
    assert pending.is_non_finite.item()
    assert pending.read().non_finite == (NonFiniteNumber(name="ibot", value=value, rank=0),)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    (found,) = gathered(norm=float("nan")).read().non_finite
    assert found.name == "gradient norm of backbone"
    assert found.value != found.value


def test_finite_numbers_are_no_problem() -> None:
    pending = gathered()
    assert not pending.is_non_finite.item()
    assert pending.read().non_finite == ()
