"""guards: limits are checked where they are written."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dinov2_core.config.guards import Guards


def test_a_return_never_raises_the_learning_rate() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Guards(rollback_learning_rate_factor=2.0)


def test_collapse_warns_unless_told_to_stop() -> None:
    assert Guards().collapse.action == "warn"
    with pytest.raises(ValidationError, match="'warn' or 'stop'"):
        Guards.model_validate_json('{"collapse": {"action": "ignore"}}')
