"""batch: moving keeps the values, splitting keeps the images, padding adds rows of weight 0."""

from __future__ import annotations

from dataclasses import fields

import pytest
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


def batch_of(num_images: int, *, num_local_crops: int = 3) -> PretrainBatch:
    masks = torch.rand(2 * num_images, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[0] = False
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    indices = masks.flatten().nonzero().flatten()
    return PretrainBatch(
        global_crops=torch.arange(2.0 * num_images)[:, None, None, None].expand(-1, 3, 6, 6),
        local_crops=torch.arange(float(num_local_crops * num_images))[:, None],
        masks=masks,
        masked_indices=indices,
        mask_weights=weights,
        num_masked=len(indices),
    )


def test_parts_hold_all_crops_of_their_images() -> None:
    whole = batch_of(6)
    parts = whole.split(3)
    for number, part in enumerate(parts):
        first = 2 * number
        images = [first, first + 1, first + 6, first + 7]
        assert part.global_crops[:, 0, 0, 0].tolist() == images
        assert part.local_crops[:, 0].tolist() == [*images, first + 12, first + 13]
        assert torch.equal(part.masks, whole.masks[images])
        assert torch.equal(part.masked_indices, part.masks.flatten().nonzero().flatten())
        per_crop = part.masks.sum(1).clamp(min=1)[:, None].expand_as(part.masks)
        assert torch.equal(part.mask_weights, 1 / per_crop[part.masks])
        assert part.num_masked == len(part.masked_indices)
    assert sum(part.num_masked for part in parts) == whole.num_masked


def test_a_batch_without_local_crops_splits() -> None:
    assert [p.local_crops.shape[0] for p in batch_of(4, num_local_crops=0).split(2)] == [0, 0]


def test_one_part_is_the_batch() -> None:
    whole = batch_of(2)
    assert whole.split(1) == (whole,)


def test_images_must_divide_into_the_parts() -> None:
    with pytest.raises(ValueError, match="6 images of a rank do not divide into 4 parts"):
        batch_of(6).split(4)


def test_padding_adds_rows_without_weight() -> None:
    whole = batch_of(3)
    padded = whole.padded(30)
    assert padded.masked_indices.shape == padded.mask_weights.shape == (30,)
    assert torch.equal(padded.masked_indices[: whole.num_masked], whole.masked_indices)
    assert not padded.mask_weights[whole.num_masked :].any()
    assert padded.num_masked == whole.num_masked
