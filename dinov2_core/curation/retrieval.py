"""Sample-based retrieval: the pile's nearest images of every seed image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov2_core.curation.neighbours import MAX_FLAT_VECTORS, CosineIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """What a seed set called up."""

    pile_indices: NDArray[np.int64]
    """Retrieved images, each once, sorted [U]."""
    num_raw: int
    """Hits with repetition, as arXiv:2304.07193 counts."""
    num_unique: int
    """U."""


def retrieve(
    seeds: NDArray[np.float32],
    pile: NDArray[np.float32],
    *,
    num_neighbours: int,
    max_flat_vectors: int = MAX_FLAT_VECTORS,
) -> Retrieval:
    """The nearest images of the pile for every seed image, arXiv:2304.07193 appendix A.

    Args:
        seeds: Unit rows [S, E].
        pile: Unit rows [N, E] of the same embedder.
        num_neighbours: Hits per seed; the paper takes 4 for large seed sets and 32 for ImageNet-1k.
        max_flat_vectors: N up to which the search is exact.
    """
    if not len(pile) or not len(seeds):
        return Retrieval(pile_indices=np.zeros(0, dtype=np.int64), num_raw=0, num_unique=0)
    index = CosineIndex(pile, max_flat_vectors=max_flat_vectors)
    found = index.search(seeds, num_neighbours=min(num_neighbours, len(pile))).indices
    hits = found[found >= 0]
    unique = np.unique(hits)
    return Retrieval(pile_indices=unique, num_raw=len(hits), num_unique=len(unique))
