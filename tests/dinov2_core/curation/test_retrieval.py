"""retrieval: against sorting all cosines."""

from __future__ import annotations

import numpy as np

from dinov2_core.curation.embedding import unit_rows
from dinov2_core.curation.retrieval import retrieve


def test_the_nearest_images_of_every_seed_are_retrieved_once() -> None:
    rng = np.random.default_rng(0)
    images = unit_rows(rng.normal(size=(200, 8)).astype(np.float32))
    seeds = unit_rows(rng.normal(size=(30, 8)).astype(np.float32))
    found = retrieve(seeds, images, num_neighbours=4)
    hits = np.argsort(-(seeds @ images.T), axis=1)[:, :4]
    assert found.tolist() == sorted(set(hits.ravel().tolist()))
    assert len(found) < hits.size


def test_nothing_is_retrieved_by_or_from_nothing() -> None:
    nothing, one = np.zeros((0, 3), dtype=np.float32), np.eye(3, dtype=np.float32)[:1]
    assert retrieve(nothing, one, num_neighbours=2).tolist() == []
    assert retrieve(one, nothing, num_neighbours=2).tolist() == []
    assert retrieve(one, one, num_neighbours=2).tolist() == [0]
