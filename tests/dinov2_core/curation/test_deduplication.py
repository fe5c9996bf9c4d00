"""deduplication: edges, components and representatives against loops."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_core.curation.deduplication import (
    choose_representatives,
    label_components,
    make_edges,
    neighbour_edges,
)
from dinov2_core.curation.embedding import unit_rows


def test_edges_are_all_pairs_above_the_threshold() -> None:
    rng = np.random.default_rng(0)
    rows = unit_rows(rng.normal(size=(60, 4)).astype(np.float32))
    edges = neighbour_edges(rows, num_neighbours=59, threshold=0.7)
    expected = [
        (i, j) for i in range(60) for j in range(i + 1, 60) if float(rows[i] @ rows[j]) >= 0.7
    ]
    assert list(zip(edges.first.tolist(), edges.second.tolist(), strict=True)) == expected
    for i, j, similarity in zip(edges.first, edges.second, edges.similarity, strict=True):
        assert similarity == pytest.approx(float(rows[i] @ rows[j]), abs=1e-4)


def test_one_image_has_no_edges() -> None:
    assert len(neighbour_edges(np.ones((1, 1), "f4"), num_neighbours=3, threshold=0.0)) == 0


def test_repeated_pairs_keep_the_highest_similarity() -> None:
    edges = make_edges(
        np.array([3, 1, 2, 2]), np.array([1, 3, 2, 0]), np.array([0.5, 0.7, 1.0, 0.12345], "f4")
    )
    assert edges.first.tolist() == [0, 1]
    assert edges.second.tolist() == [2, 3]
    assert edges.similarity.tolist() == pytest.approx([0.1235, 0.7], abs=1e-4)
    assert edges.at_least(0.7).first.tolist() == [1]
    assert edges.within(np.array([True, False, True, True])).first.tolist() == [0]


def test_components_equal_merging_by_hand() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 100, (2, 60))
    edges = make_edges(first, second, np.ones(60, dtype=np.float32))
    groups = [{i} for i in range(100)]
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        one = next(group for group in groups if i in group)
        other = next(group for group in groups if j in group)
        if one is not other:
            one |= other
            groups.remove(other)
    labels = label_components(100, edges)
    expected = sorted((sorted(group) for group in groups), key=lambda group: group[0])
    assert [np.flatnonzero(labels == c).tolist() for c in range(labels.max() + 1)] == expected


def test_representatives_are_large_then_heavy_then_first_by_name() -> None:
    chosen = choose_representatives(
        np.array([0, 0, 0, 1, 1, 2, 2]),
        areas=np.array([4, 9, 4, 5, 5, 6, 6]),
        sizes_bytes=np.array([9, 1, 9, 1, 2, 3, 3]),
        names=np.array(["a", "b", "c", "d", "e", "g", "f"]),
    )
    assert chosen.tolist() == [1, 4, 6]
