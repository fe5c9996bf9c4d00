"""retrieval: against sorting all cosines."""

from __future__ import annotations

import numpy as np

from dinov2_core.curation.embedding import unit_rows
from dinov2_core.curation.retrieval import retrieve


def test_the_nearest_images_of_every_seed_come_back_once() -> None:
    rng = np.random.default_rng(0)
    pile = unit_rows(rng.normal(size=(200, 8)).astype(np.float32))
    seeds = unit_rows(rng.normal(size=(30, 8)).astype(np.float32))
    found = retrieve(seeds, pile, num_neighbours=4)
    hits = np.argsort(-(seeds @ pile.T), axis=1)[:, :4]
    assert found.pile_indices.tolist() == sorted(set(hits.ravel().tolist()))
    assert found.num_raw == 120
    assert found.num_unique == len(found.pile_indices) < 120


def test_nothing_comes_of_nothing() -> None:
    nothing, one = np.zeros((0, 3), dtype=np.float32), np.eye(3, dtype=np.float32)[:1]
    assert retrieve(nothing, one, num_neighbours=2).num_unique == 0
    assert retrieve(one, nothing, num_neighbours=2).num_unique == 0
    assert retrieve(one, one, num_neighbours=2).num_raw == 1
