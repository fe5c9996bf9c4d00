"""Block-wise masks of the student's global crops and their spread over a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2_core.config.augmentation import NUM_GLOBAL_CROPS, Masking
from dinov2_core.data.randomness import Stream, hashed_bits

_NUM_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRecipe:
    """Which share of the global crops is masked and how much of each, arXiv:2111.07832."""

    grid_height: int
    """Patches from top to bottom of a global crop."""
    grid_width: int
    """Patches from left to right of a global crop."""
    masking: Masking
    """Share of masked crops and of masked patches in them."""

    def most_masked(self, num_crops: int, *, global_batch_size: int) -> int:
        """Upper bound of the masked patches in some crops of a global batch, see `batch_masks`.

        Chance may give these crops the highest strata of all.
        """
        edges = self.edges(global_batch_size)[1:]
        num_patches = self.grid_height * self.grid_width
        return sum(int(num_patches * ratio) for ratio in edges[max(len(edges) - num_crops, 0) :])

    def edges(self, global_batch_size: int) -> NDArray[np.float64]:
        """Bounds of the strata that masked crops draw their ratios from, one more than crops."""
        num_masked_crops = int(NUM_GLOBAL_CROPS * global_batch_size * self.masking.probability)
        return np.linspace(*self.masking.ratio, num_masked_crops + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMasks:
    """Masks of one rank's global crops; crop 0 of every image first, then crop 1."""

    masks: Tensor
    """[2B, N] bool, true where the student does not see the patch."""
    masked_indices: Tensor
    """[M] int64: masked patches counted through the flattened [2B * N]."""
    mask_weights: Tensor
    """[M] float32: 1 / number of masked patches of the crop the patch belongs to."""


def block_mask(
    *,
    height: int,
    width: int,
    num_masked: int,
    random: Random,
    min_block_patches: int = 4,
    aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> NDArray[np.bool_]:
    """Cover about `num_masked` patches with random rectangles (BEiT, arXiv:2106.08254).

    Never more than `num_masked`; a few less when ten tries in a row find no rectangle that fits.
    Draws from `random` in the reference's order (per try: area, log aspect ratio and, if the
    rectangle fits the grid, top and left), so a seeded `Random` gives the reference's masks. A
    rectangle covers at most (height // 2) * width patches.

    Args:
        height: Patches from top to bottom.
        width: Patches from left to right.
        num_masked: Patches wanted.
        random: Source of all choices.
        min_block_patches: Smallest area of a rectangle before overlap.
        aspect_ratio: Smallest and largest height / width of a rectangle.

    Returns:
        Mask [height, width], true where masked.
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    largest = (height // 2) * width
    log_aspects = (math.log(aspect_ratio[0]), math.log(aspect_ratio[1]))
    remaining = num_masked
    while remaining > 0:
        added = _add_block(
            mask,
            areas=(min_block_patches, min(remaining, largest)),
            log_aspects=log_aspects,
            random=random,
        )
        if added == 0:
            break
        remaining -= added
    return mask


def _add_block(
    mask: NDArray[np.bool_],
    *,
    areas: tuple[int, int],
    log_aspects: tuple[float, float],
    random: Random,
) -> int:
    """Mask one more rectangle in place; returns the patches it newly covers, 0 after ten tries."""
    height, width = mask.shape
    for _ in range(_NUM_TRIES):
        area = random.uniform(*areas)
        aspect = math.exp(random.uniform(*log_aspects))
        block_height = round(math.sqrt(area * aspect))
        block_width = round(math.sqrt(area / aspect))
        if block_height >= height or block_width >= width:
            continue
        top = random.randint(0, height - block_height)
        left = random.randint(0, width - block_width)
        block = mask[top : top + block_height, left : left + block_width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= areas[1]:
            block[:] = True
            return added
    return 0


def batch_masks(
    positions: NDArray[np.int64],
    *,
    step: int,
    global_batch_size: int,
    recipe: MaskRecipe,
    seed: int,
) -> BatchMasks:
    """Masks of one rank's part of the global batch, the same for any number of ranks.

    Of the 2 * global_batch_size crops a share of `probability` is masked; the i-th of these gets a
    ratio drawn from the i-th of equal slices of `ratio`, and chance says which crop is the i-th
    (arXiv:2304.07193, as in its released code, which stratifies every rank by itself).

    Args:
        positions: Positions of this rank's images in the run's order [B].
        step: Optimizer step; positions lie in [step, step + 1) * global_batch_size.
        global_batch_size: Images of all ranks.
        recipe: Grid, share and ratios.
        seed: Of the run.
    """
    num_crops = NUM_GLOBAL_CROPS * global_batch_size
    edges = recipe.edges(global_batch_size)
    num_masked_crops = len(edges) - 1
    strata = _strata(step, num_crops=num_crops, seed=seed)
    within = positions - step * global_batch_size
    num_patches = recipe.grid_height * recipe.grid_width
    masks = np.zeros((NUM_GLOBAL_CROPS, len(positions), num_patches), dtype=np.bool_)
    seeds = hashed_bits(positions, seed=seed, stream=Stream.MASK_BLOCKS, num_draws=NUM_GLOBAL_CROPS)
    for crop in range(NUM_GLOBAL_CROPS):
        crop_strata = strata[crop * global_batch_size + within]
        for image in np.flatnonzero(crop_strata < num_masked_crops):
            stratum = crop_strata[image]
            random = Random(int(seeds[image, crop]))
            ratio = random.uniform(float(edges[stratum]), float(edges[stratum + 1]))
            masks[crop, image] = block_mask(
                height=recipe.grid_height,
                width=recipe.grid_width,
                num_masked=int(num_patches * ratio),
                random=random,
            ).ravel()
    return _indexed(torch.from_numpy(masks.reshape(-1, num_patches)))


def _strata(step: int, *, num_crops: int, seed: int) -> NDArray[np.int64]:
    """A random permutation of the crops of one global batch, [2 * global_batch_size]."""
    words = hashed_bits(np.array([step]), seed=seed, stream=Stream.MASK_STRATA, num_draws=num_crops)
    return np.argsort(np.argsort(words[0], kind="stable"), kind="stable")


def _indexed(masks: Tensor) -> BatchMasks:
    per_crop = masks.sum(dim=1, keepdim=True).clamp(min=1)  # [2B, 1]
    return BatchMasks(
        masks=masks,
        masked_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1.0 / per_crop).expand_as(masks)[masks].float(),
    )
