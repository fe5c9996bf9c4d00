"""Infinite order of the images, a function of (seed, position) that holds no permutation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov2_core.data.randomness import Stream, hashed_bits, mixed

_NUM_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOrder:
    """Which image stands at which position: one random permutation of all images per epoch.

    The permutation is a keyed Feistel network over the next power of four, walked until it lands
    inside the data set (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), so
    memory does not grow with the number of images and no position depends on an earlier one.
    """

    num_images: int
    """Images of the data set, at least 1."""
    seed: int
    """Of the order; another seed gives unrelated epochs."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(
                f"num_images {self.num_images} leaves nothing to order; give at least one image"
            )

    def image_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Image numbers in [0, num_images) at positions >= 0 counted from the run's start, [P]."""
        epochs, within = np.divmod(positions, self.num_images)
        keys = hashed_bits(epochs, seed=self.seed, stream=Stream.ORDER, num_draws=_NUM_ROUNDS)
        images = self._scrambled(within.astype(np.uint64), keys)
        outside = np.flatnonzero(images >= self.num_images)
        while outside.size:
            images[outside] = self._scrambled(images[outside], keys[outside])
            outside = outside[images[outside] >= self.num_images]
        return images.astype(np.int64)

    def _scrambled(
        self, values: NDArray[np.uint64], keys: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        half_bits = np.uint64(max(1, ((self.num_images - 1).bit_length() + 1) // 2))
        half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
        left, right = values >> half_bits, values & half_mask
        for turn in range(_NUM_ROUNDS):
            left, right = right, left ^ (mixed(right ^ keys[:, turn]) & half_mask)
        return (left << half_bits) | right


def rank_positions(
    *, step: int, global_batch_size: int, rank: int, world_size: int
) -> NDArray[np.int64]:
    """Positions of one rank at one step: its contiguous slice of the global batch, [B].

    Position p = step * global_batch_size + i for the i-th image of the global batch, whatever the
    number of ranks.
    """
    if global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not divisible by {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks (0 to {world_size - 1})")
    batch_size_per_rank = global_batch_size // world_size
    first = step * global_batch_size + rank * batch_size_per_rank
    return np.arange(first, first + batch_size_per_rank, dtype=np.int64)
