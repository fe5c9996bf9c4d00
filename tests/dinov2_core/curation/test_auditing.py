"""auditing: recalls of a manifest written by hand."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dinov2_core.curation.auditing import Audit, audit
from dinov2_core.errors import InputError

GROUND_TRUTH = pa.table(
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
        # a's copy is found and kept instead; b's copy is missed; c is lost to b; a leak is kept.
        "kept": [False, True, False, True, True, False, True, False, False, False],
        "reason": [
            "exact_copy", "", "near_copy", "", "", "near_copy", "", "not_an_image", "too_small",
            "near_copy",
        ],
        "component": [0, 1, 1, 0, 2, 1, 3, None, None, 4],
    }
)  # fmt: skip


def test_recalls() -> None:
    assert audit(MANIFEST, GROUND_TRUTH) == Audit(
        exact_recall=1 / 2,
        near_recall=1.0,
        leak_recall=0.0,
        corrupt_recall=2 / 3,
        distinct_lost=1 / 3,
    )


@pytest.mark.parametrize(("reason", "recall"), [("unreadable", 1.0), ("exact_copy", 2 / 3)])
def test_a_corrupt_file_is_found_if_it_is_dropped_for_what_it_is(
    reason: str, recall: float
) -> None:
    reasons = [*MANIFEST["reason"].to_pylist()[:-1], reason]
    manifest = MANIFEST.set_column(2, "reason", pa.array(reasons))
    assert audit(manifest, GROUND_TRUTH).corrupt_recall == recall


def test_all_of_no_defects_are_found() -> None:
    made = audit(MANIFEST.slice(0, 0), GROUND_TRUTH.slice(0, 0))
    assert (made.near_recall, made.distinct_lost) == (1, 0)


def test_another_ground_truth_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"1 files of the ground truth are not in the manifest, e\.g\. j"
    ):
        audit(MANIFEST.slice(0, 9), GROUND_TRUTH)
