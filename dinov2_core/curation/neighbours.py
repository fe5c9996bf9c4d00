"""Nearest neighbours by cosine: exact for small sets, inverted lists for large ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

MAX_FLAT_VECTORS = 50_000
"""Vectors up to which every pair is compared."""

_POINTS_PER_LIST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The k nearest of every query, nearest first; -1 where there are fewer."""

    indices: NDArray[np.int64]
    """[Q, k]."""
    similarities: NDArray[np.float32]
    """[Q, k], cosine."""


class CosineIndex:
    """Index of unit vectors by cosine."""

    def __init__(
        self,
        vectors: NDArray[np.float32],
        *,
        max_flat_vectors: int = MAX_FLAT_VECTORS,
        num_probes: int = 16,
    ) -> None:
        """Build the index.

        Args:
            vectors: Unit rows [N, E].
            max_flat_vectors: N up to which search is exact; beyond, IVF-Flat with up to 4 sqrt(N)
                lists. Its k-means has a fixed seed and one thread, so the same vectors give the
                same index.
            num_probes: Lists searched per query.
        """
        number, dimensions = vectors.shape
        flat = faiss.IndexFlatIP(dimensions)
        self._index: faiss.Index = flat
        if number > max_flat_vectors:
            num_lists = max(1, min(int(4 * number**0.5), number // _POINTS_PER_LIST))
            inverted = faiss.IndexIVFFlat(flat, dimensions, num_lists, faiss.METRIC_INNER_PRODUCT)
            inverted.nprobe = num_probes
            with _one_thread():
                inverted.train(vectors)
            self._index = inverted
        self._index.add(vectors)

    def search(self, queries: NDArray[np.float32], *, num_neighbours: int) -> Neighbours:
        """The nearest vectors of unit queries [Q, E]."""
        similarities, indices = self._index.search(queries, num_neighbours)
        return Neighbours(indices=indices, similarities=similarities)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
