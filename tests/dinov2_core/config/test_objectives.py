from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from dinov2_core.config.objectives import (
    Centering,
    Head,
    IbotObjective,
    SharedHead,
    SoftmaxCentering,
)


def test_a_choice_is_named_by_its_kind() -> None:
    shared = IbotObjective.model_validate_json('{"head": {"kind": "shared"}}')
    assert shared.head == SharedHead()
    own = IbotObjective.model_validate_json('{"head": {"kind": "own", "num_prototypes": 8}}')
    assert own.head == Head(num_prototypes=8)
    softmax = TypeAdapter[Centering](Centering).validate_json('{"kind": "softmax"}')
    assert softmax == SoftmaxCentering()


def test_a_setting_of_the_other_choice_is_refused() -> None:
    with pytest.raises(ValidationError, match="num_iterations"):
        TypeAdapter(Centering).validate_json('{"kind": "softmax", "num_iterations": 3}')
