from __future__ import annotations

import torch

from dinov2_core.device_kind import device_kind, planned_for


def test_a_tensor_is_of_its_own_device_unless_a_plan_says_otherwise() -> None:
    tensor = torch.zeros(1)
    assert device_kind(tensor) == "cpu"
    with planned_for("cuda"):
        assert device_kind(tensor) == "cuda"
    assert device_kind(tensor) == "cpu"
