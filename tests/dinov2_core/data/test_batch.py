"""batch: moving keeps the values."""

from __future__ import annotations

from dataclasses import fields

import torch

from dinov2_core.data.batch import PretrainBatch


def test_moving_keeps_every_field() -> None:
    batch = PretrainBatch(
        global_crops=torch.rand(4, 3, 8, 8),
        local_crops=torch.rand(2, 3, 4, 4),
        masks=torch.eye(4, dtype=torch.bool),
        masked_indices=torch.tensor([0, 5, 10, 15]),
        mask_weights=torch.ones(4),
        num_masked=4,
    )
    moved = batch.to(torch.device("cpu"))
    assert all(
        torch.equal(
            torch.as_tensor(getattr(moved, f.name)), torch.as_tensor(getattr(batch, f.name))
        )
        for f in fields(batch)
    )
