from __future__ import annotations

from typing import Any

import pytest

from dinov2_core.planning.step import DEEP, trace_step
from tests.dinov2_core.planning.configs import small_config


def slow(settings: dict[str, Any], ranks: dict[str, Any]) -> Any:
    return pytest.param(settings, ranks, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, {"world_size": 1}),
        slow({"recomputes": "selective"}, {"world_size": 4}),
        slow({"recomputes": "full"}, {"world_size": 4, "kind": "cpu"}),
        ({"accumulation_steps": 2}, {"world_size": 4, "num_replicas": 2}),
        slow({"recomputes": "full", "embed_dim": 256}, {"world_size": 16}),
        slow({"recomputes": "full", "embed_dim": 256, "global_batch_size": 2}, {"world_size": 2}),
    ],
)
def test_two_shallow_models_give_the_numbers_of_a_deep_one(
    settings: dict[str, Any], ranks: dict[str, Any]
) -> None:
    """Also where memory is highest at other moments than in the shallow models."""
    config = small_config(precision="bf16", depth=DEEP, **settings)
    assert trace_step(config, **ranks) == trace_step(config, extrapolates=False, **ranks)
