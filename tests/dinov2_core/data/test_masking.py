"""masking: the reference's blocks, spread over the global batch for any number of ranks."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dinov2_core.config.augmentation import Masking
from dinov2_core.data.masking import BatchMasks, MaskRecipe, batch_masks, block_mask
from dinov2_core.data.sampler import rank_positions


def cell_by_cell(height: int, width: int, wanted: int, random: Random) -> NDArray[np.bool_]:
    """The definition, one patch at a time."""
    covered: set[tuple[int, int]] = set()
    while len(covered) < wanted:
        limit = min(wanted - len(covered), int(int(0.5 * height) * width))
        new: set[tuple[int, int]] = set()
        for _ in range(10):
            area = random.uniform(4, limit)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top, left = random.randint(0, height - tall), random.randint(0, width - wide)
                block = {(top + i, left + j) for i in range(tall) for j in range(wide)}
                if 0 < len(block - covered) <= limit:
                    new = block - covered
                    break
        if not new:
            break
        covered |= new
    mask = np.zeros((height, width), dtype=np.bool_)
    for cell in covered:
        mask[cell] = True
    return mask


@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 14), (7, 7), (4, 4), (37, 20)])
def test_equals_the_definition_draw_for_draw(height: int, width: int) -> None:
    for seed in range(30):
        wanted = int(height * width * (0.1 + 0.4 * seed / 30))
        one, other = Random(seed), Random(seed)
        ours = block_mask(height=height, width=width, num_masked=wanted, random=one)
        assert np.array_equal(ours, cell_by_cell(height, width, wanted, other))
        assert one.random() == other.random()
        assert ours.sum() <= wanted


def test_hardly_falls_short() -> None:
    shortfalls = [
        128 - block_mask(height=16, width=16, num_masked=128, random=Random(seed)).sum()
        for seed in range(100)
    ]
    assert max(shortfalls) <= 3
    assert np.mean(shortfalls) < 0.3


def masks_of(rank: int, world_size: int, *, step: int = 3, recipe: MaskRecipe) -> BatchMasks:
    positions = rank_positions(step=step, global_batch_size=8, rank=rank, world_size=world_size)
    return batch_masks(positions, step=step, global_batch_size=8, recipe=recipe, seed=5)


RECIPE = MaskRecipe(grid_height=16, grid_width=16, masking=Masking())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_hold_the_masks_of_one(world_size: int) -> None:
    whole = masks_of(0, 1, recipe=RECIPE).masks.view(2, 8, -1)
    parts = [masks_of(r, world_size, recipe=RECIPE).masks for r in range(world_size)]
    joined = torch.cat([part.view(2, 8 // world_size, -1) for part in parts], dim=1)
    assert torch.equal(joined, whole)


def test_half_of_the_crops_are_masked_with_ratios_from_equal_slices() -> None:
    counts = np.sort(masks_of(0, 1, recipe=RECIPE).masks.sum(dim=1).numpy())
    assert (counts[:8] == 0).all()
    edges = np.linspace(0.1, 0.5, 9) * 256
    assert (counts[8:] <= edges[1:]).all()
    assert (counts[8:] >= edges[:-1] - 3).all()


def test_which_crops_are_masked_changes_from_step_to_step() -> None:
    masked = torch.stack(
        [masks_of(0, 1, step=step, recipe=RECIPE).masks.any(dim=1) for step in range(200)]
    )
    assert (masked.sum(dim=1) == 8).all()
    share = masked.float().mean(dim=0)
    assert ((share > 0.35) & (share < 0.65)).all()


def test_indices_and_weights_follow_from_the_masks() -> None:
    made = masks_of(1, 2, recipe=RECIPE)
    indices, weights = [], []
    for crop, mask in enumerate(made.masks.tolist()):
        for patch, is_masked in enumerate(mask):
            if is_masked:
                indices.append(crop * 256 + patch)
                weights.append(1 / sum(mask))
    assert made.masked_indices.tolist() == indices
    assert made.masked_indices.dtype == torch.int64
    torch.testing.assert_close(made.mask_weights, torch.tensor(weights))


def test_probability_zero_masks_nothing() -> None:
    masking = Masking(probability=0.0)
    made = masks_of(0, 1, recipe=MaskRecipe(grid_height=4, grid_width=4, masking=masking))
    assert not made.masks.any()
    assert made.masked_indices.shape == made.mask_weights.shape == (0,)


def test_no_share_of_a_batch_has_more_masked_patches_than_the_bound() -> None:
    recipe = MaskRecipe(grid_height=6, grid_width=6, masking=Masking())
    for world_size in (1, 2, 4):
        bound = recipe.most_masked(2 * 8 // world_size, global_batch_size=8)
        counts = [
            len(
                batch_masks(
                    rank_positions(
                        step=step, global_batch_size=8, rank=rank, world_size=world_size
                    ),
                    step=step,
                    global_batch_size=8,
                    recipe=recipe,
                    seed=0,
                ).masked_indices
            )
            for step in range(30)
            for rank in range(world_size)
        ]
        assert bound * 0.5 < max(counts) <= bound


def test_the_bound_is_the_references() -> None:
    assert RECIPE.most_masked(16, global_batch_size=8) == 663
