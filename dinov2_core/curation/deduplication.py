"""Copies: similarity edges, connected components, one representative of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinov2_core.curation.neighbours import MAX_FLAT_VECTORS, CosineIndex

_SEARCH_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """Pairs of similar images, each once with first < second, sorted.

    Some lie below every threshold in use, so that a threshold can change without searching again.
    """

    first: NDArray[np.int64]
    """[M]."""
    second: NDArray[np.int64]
    """[M]."""
    similarity: NDArray[np.float32]
    """[M], rounded to 4 decimals: the last bits differ between machines."""

    def __len__(self) -> int:
        return len(self.first)

    def at_least(self, threshold: float) -> Edges:
        """Edges whose similarity reaches the threshold."""
        return self._where(self.similarity >= np.float32(threshold))

    def within(self, group: NDArray[np.bool_]) -> Edges:
        """Edges with both ends in a group, a mask over the images [N]."""
        return self._where(group[self.first] & group[self.second])

    def _where(self, mask: NDArray[np.bool_]) -> Edges:
        return Edges(
            first=self.first[mask], second=self.second[mask], similarity=self.similarity[mask]
        )


def make_edges(
    first: NDArray[np.int64], second: NDArray[np.int64], similarity: NDArray[np.float32]
) -> Edges:
    """Edges from pairs in any order and direction; of repeated pairs the most similar stays.

    Args:
        first: [P].
        second: [P]; pairs of an image with itself are left out.
        similarity: [P].
    """
    low, high = np.minimum(first, second), np.maximum(first, second)
    order = np.lexsort((-similarity, high, low))
    order = order[low[order] != high[order]]
    low, high, similarity = low[order], high[order], similarity[order]
    is_new = np.ones(len(low), dtype=np.bool_)
    is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    return Edges(
        first=low[is_new],
        second=high[is_new],
        similarity=np.round(similarity[is_new], 4).astype(np.float32),
    )


def neighbour_edges(
    embeddings: NDArray[np.float32],
    *,
    num_neighbours: int,
    threshold: float,
    max_flat_vectors: int = MAX_FLAT_VECTORS,
) -> Edges:
    """Edges between every image and its nearest neighbours, arXiv:2304.07193 appendix A.

    Args:
        embeddings: Unit rows [N, E].
        num_neighbours: Neighbours per image; the paper uses 64.
        threshold: Smallest cosine of an edge.
        max_flat_vectors: N up to which the search is exact.
    """
    number = len(embeddings)
    if number < 2:
        nothing = np.zeros(0, dtype=np.int64)
        return make_edges(nothing, nothing, np.zeros(0, dtype=np.float32))
    index = CosineIndex(embeddings, max_flat_vectors=max_flat_vectors)
    num_found = min(num_neighbours + 1, number)  # every image finds itself
    firsts, seconds, similarities = [], [], []
    for start in range(0, number, _SEARCH_ROWS):
        found = index.search(embeddings[start : start + _SEARCH_ROWS], num_neighbours=num_found)
        rows = np.repeat(np.arange(start, start + len(found.indices)), num_found)
        is_edge = (found.similarities.ravel() >= threshold) & (found.indices.ravel() >= 0)
        firsts.append(rows[is_edge])
        seconds.append(found.indices.ravel()[is_edge])
        similarities.append(found.similarities.ravel()[is_edge])
    return make_edges(np.concatenate(firsts), np.concatenate(seconds), np.concatenate(similarities))


def label_components(num_images: int, edges: Edges) -> NDArray[np.int64]:
    """Connected component of every image [N]."""
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges.first, edges.second)), shape=(num_images, num_images))
    return number_in_order(connected_components(graph, directed=False)[1])


def number_in_order(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """The same groups [N], numbered from 0 in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[inverse].astype(np.int64)


def choose_representatives(
    components: NDArray[np.int64],
    *,
    areas: NDArray[np.int64],
    sizes_bytes: NDArray[np.int64],
    names: NDArray[np.str_],
) -> NDArray[np.int64]:
    """The representative of each component: largest area, then most bytes, then first name.

    Args:
        components: Component of every image [N].
        areas: Pixels [N].
        sizes_bytes: Size of the files [N].
        names: Breaks ties, e.g. content hashes [N].

    Returns:
        Image number for every component, indexed by component [C].
    """
    order = np.lexsort((names, -sizes_bytes, -areas, components))
    sorted_components = components[order]
    is_first = np.ones(len(order), dtype=np.bool_)
    is_first[1:] = sorted_components[1:] != sorted_components[:-1]
    return order[is_first].astype(np.int64)
