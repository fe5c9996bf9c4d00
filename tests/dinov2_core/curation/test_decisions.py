"""decisions: every rule on a few files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dinov2_core.curation.decisions import Decisions, decide
from dinov2_core.curation.deduplication import make_edges
from dinov2_core.curation.unique_images import UniqueImages


def file(name: str, *, side: int = 10, reason: str = "") -> dict[str, object]:
    return {
        "name": name,
        "sha256": name,
        "size_bytes": side,
        "width": side,
        "height": side,
        "format": "png",
        "reason": reason,
    }


# Images 0..5 are source images, 6 is an evaluation image, 7 is both.
# Files: a and b show 0, c shows 1 (larger), d shows 2, e is broken, f shows 3, g 4, h 5, i 7.
IMAGES = UniqueImages(
    files=pa.Table.from_pylist(
        [
            file("a"),
            file("b"),
            file("c", side=20),
            file("d"),
            file("e", reason="truncated"),
            file("f"),
            file("g"),
            file("h"),
            file("i"),
        ]
    ),
    image_of_file=np.array([0, 0, 1, 2, -1, 3, 4, 5, 7]),
    is_evaluation=np.array([False] * 6 + [True, True]),
    pixel_hashes=np.array(list("01234567")),
    embeddings=np.zeros((8, 1), dtype=np.float32),
    thumbnails=np.zeros((8, 32, 32), dtype=np.uint8),
)
# 0-1 near; 2-3 near and 3-6 a leak; 4-5 below near; 4-6 below leak; 0-7 and 1-7 joined only by 7.
EDGES = make_edges(
    np.array([0, 2, 3, 4, 4]),
    np.array([1, 3, 6, 5, 6]),
    np.array([0.9, 0.95, 0.7, 0.75, 0.6], dtype=np.float32),
)


def decided(retrieved: list[int] | None = None) -> Decisions:
    return decide(
        IMAGES,
        edges=EDGES,
        near_threshold=0.8,
        leak_threshold=0.65,
        retrieved=None if retrieved is None else np.array(retrieved),
    )


def test_reasons() -> None:
    assert decided().reasons.tolist() == [
        "near_copy",
        "exact_copy",
        "",
        "evaluation_leak",
        "truncated",
        "evaluation_leak",
        "",
        "",
        "evaluation_leak",
    ]


def test_components_and_representatives() -> None:
    made = decided()
    assert made.components.tolist() == [0, 0, 0, 1, -1, 1, 2, 3, 4]
    assert made.sizes.tolist() == [3, 3, 3, 2, -1, 2, 1, 1, 1]
    assert made.representatives.tolist() == [2, 2, 2, 3, -1, 3, 6, 7, 8]
    assert made.largest_component == 2, "a and b show the same image"


def test_nearest_files_and_evaluation_similarities() -> None:
    made = decided()
    assert made.nearest.tolist() == [1, 0, 0, 5, -1, 3, 7, 6, -1]
    np.testing.assert_allclose(
        made.nearest_similarity, [1, 1, 0.9, 0.95, np.nan, 0.95, 0.75, 0.75, np.nan], rtol=1e-6
    )
    np.testing.assert_allclose(
        made.evaluation_similarity,
        [np.nan, np.nan, np.nan, np.nan, np.nan, 0.7, 0.6, np.nan, 1],
        rtol=1e-6,
    )


def test_components_with_a_retrieved_image_are_kept() -> None:
    reasons = decided([0, 4]).reasons.tolist()
    assert reasons[:3] == ["near_copy", "exact_copy", ""]
    assert reasons[6:8] == ["", "not_retrieved"]
    assert reasons[3] == reasons[8] == "evaluation_leak"
