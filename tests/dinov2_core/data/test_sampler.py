"""sampler: every epoch a permutation, for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_core.data.sampler import ImageOrder, rank_positions


@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 16, 17, 1000, 4096, 4097, 65_537])
def test_every_epoch_is_a_permutation(num_images: int) -> None:
    order = ImageOrder(num_images=num_images, seed=7)
    images = order.image_at(np.arange(3 * num_images)).reshape(3, num_images)
    assert np.array_equal(np.sort(images, axis=1), np.tile(np.arange(num_images), (3, 1)))


def test_epochs_and_seeds_differ() -> None:
    first = ImageOrder(num_images=500, seed=0).image_at(np.arange(1000)).reshape(2, 500)
    other = ImageOrder(num_images=500, seed=1).image_at(np.arange(500))
    assert (first[0] == first[1]).mean() < 0.02
    assert (first[0] == other).mean() < 0.02


def test_every_image_is_equally_likely_everywhere() -> None:
    num_images, num_epochs = 5, 8000
    images = ImageOrder(num_images=num_images, seed=1).image_at(np.arange(5 * num_epochs))
    pairs = images.reshape(num_epochs, num_images)
    counts = np.stack([np.bincount(column, minlength=5) for column in pairs.T])
    expected = num_epochs / num_images
    assert ((counts - expected) ** 2 / expected).sum() < 48  # 16 degrees of freedom, p = 5e-5


def test_neighbours_in_a_large_order_are_unrelated() -> None:
    images = ImageOrder(num_images=1_000_000_007, seed=0).image_at(np.arange(20_000))
    assert images.min() >= 0
    assert images.max() < 1_000_000_007
    assert len(np.unique(images)) == 20_000
    scaled = images / 1_000_000_007
    assert abs(np.corrcoef(scaled[:-1], scaled[1:])[0, 1]) < 0.03
    assert abs(scaled.mean() - 0.5) < 0.01


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_global_batch_in_order(world_size: int) -> None:
    slices = [
        rank_positions(step=5, global_batch_size=16, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate(slices), np.arange(80, 96))


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size 10 is not divisible by 4 ranks"):
        rank_positions(step=0, global_batch_size=10, rank=0, world_size=4)
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        rank_positions(step=0, global_batch_size=10, rank=2, world_size=2)
    with pytest.raises(ValueError, match="num_images 0 leaves nothing"):
        ImageOrder(num_images=0, seed=0)
