"""frozen: a value that does not change and takes no key that it does not know."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dinov2_core.config.frozen import Frozen


class Size(Frozen):
    width: float = 1.0


def test_a_value_is_fixed_and_closed() -> None:
    size = Size(width=2.0)
    with pytest.raises(ValidationError, match="frozen"):
        size.width = 3.0
    with pytest.raises(ValidationError, match="Extra inputs"):
        Size.model_validate_json('{"height": 1.0}')
    with pytest.raises(ValidationError, match="finite"):
        Size(width=float("nan"))
