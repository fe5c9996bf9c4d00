"""auditing: recalls of a manifest written by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dinov2_core.curation.auditing import Recall, audit

TRUTH = pa.table(
    {
        "path": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"],
        "kind": [
            "clean", "clean", "clean", "exact", "exact", "cropped", "leak_exact", "html", "tiny",
            "text",
        ],
        "source": ["a", "b", "c", "a", "b", "c", "test-1", "h", "i", "j"],
    }
)  # fmt: skip
MANIFEST = pa.table(
    {
        "uri": list("abcdefghij"),
        # a's copy is found and stands for it; b's copy is missed; c is lost to b; a leak is kept.
        "kept": [False, True, False, True, True, False, True, False, False, False],
        "reason": [
            "exact_copy", "", "near_copy", "", "", "near_copy", "", "not_an_image", "too_small",
            "near_copy",
        ],
        "component": [0, 1, 1, 0, 2, 1, 3, None, None, 4],
    }
)  # fmt: skip


def test_recalls() -> None:
    made = audit(MANIFEST, TRUTH)
    assert made.exact == Recall(found=1, planted=2)
    assert made.near == made.cropped == Recall(found=1, planted=1)
    assert made.leaks == Recall(found=0, planted=1)
    assert made.corrupt == Recall(found=1, planted=2)
    assert made.tiny == Recall(found=1, planted=1)
    assert (made.num_distinct, made.num_distinct_lost) == (3, 1)
    assert made.lost_share == pytest.approx(1 / 3)
    assert made.exact.share == 0.5


def test_nothing_planted_is_all_found() -> None:
    made = audit(MANIFEST.slice(0, 0), TRUTH.slice(0, 0))
    assert made.near.share == 1
    assert made.lost_share == 0


def test_another_pile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 planted files are not in the manifest, e\.g\. j"):
        audit(MANIFEST.slice(0, 9), TRUTH)
