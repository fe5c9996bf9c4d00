"""neighbours: against comparing all pairs."""

from __future__ import annotations

import numpy as np

from dinov2_core.curation.embedding import unit_rows
from dinov2_core.curation.neighbours import CosineIndex


def vectors(number: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    made = centres[rng.integers(20, size=number)] + 0.3 * rng.normal(size=(number, 16))
    return unit_rows(made.astype(np.float32))


def test_few_vectors_are_searched_exactly() -> None:
    rows = vectors(300)
    found = CosineIndex(rows).search(rows[:50], num_neighbours=5)
    cosines = rows[:50] @ rows.T
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    assert np.array_equal(found.indices, expected)
    np.testing.assert_allclose(
        found.similarities, np.take_along_axis(cosines, expected, axis=1), atol=1e-6
    )


def test_many_vectors_are_searched_nearly_exactly_and_repeatably() -> None:
    rows = vectors(4000)
    exact = CosineIndex(rows).search(rows, num_neighbours=5)
    one, other = (
        CosineIndex(rows, max_flat_vectors=1000).search(rows, num_neighbours=5) for _ in range(2)
    )
    assert (one.indices == exact.indices).mean() > 0.98
    assert np.array_equal(one.indices, other.indices)
    assert np.array_equal(one.similarities, other.similarities)


def test_missing_neighbours_are_minus_one() -> None:
    rows = vectors(3)
    assert (CosineIndex(rows).search(rows, num_neighbours=5).indices[:, 3:] == -1).all()
