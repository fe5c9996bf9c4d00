"""Audit: how many of the synthetic defects curation found, and how many images that cost."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from dinov2_core.curation.manifest import Reason
from dinov2_core.curation.synthetic_defects import CORRUPT_KINDS, LEAK_KINDS, NEAR_KINDS, Kind
from dinov2_core.errors import InputError

_REASONS_OF_IMAGES = {"", Reason.EXACT_COPY, Reason.NEAR_COPY, Reason.EVALUATION_LEAK}
"""Outcomes of files that were taken for images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Shares in [0, 1]; 1 is also the recall of a defect that was not added."""

    exact_recall: float
    """Of exact copies: in the component of their source, at most one of the two kept."""
    near_recall: float
    """Of near copies."""
    leak_recall: float
    """Of copies of evaluation images: dropped as leaks."""
    corrupt_recall: float
    """Of broken files and 1 x 1 images: dropped for what they are."""
    distinct_lost: float
    """Of clean images: neither they nor a copy was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    kept: bool
    reason: str
    component: int | None


def audit(manifest: pa.Table, ground_truth: pa.Table) -> Audit:
    """Compare a manifest with the synthetic defects.

    Args:
        manifest: Its uris are the paths of the ground truth.
        ground_truth: `GROUND_TRUTH_SCHEMA` of `synthetic_defects`.

    Raises:
        InputError: They do not belong together.
    """
    outcomes = {
        row.pop("uri"): _Outcome(**row)
        for row in manifest.select(["uri", "kept", "reason", "component"]).to_pylist()
    }
    rows = [(Kind(row["kind"]), row["path"], row["source"]) for row in ground_truth.to_pylist()]
    missing = [path for _, path, _ in rows if path not in outcomes]
    if missing:
        raise InputError(
            f"{len(missing)} files of the ground truth are not in the manifest, e.g. {missing[0]}; "
            "curate the folder that the ground truth belongs to"
        )

    def recall(*kinds: Kind) -> float:
        found = [
            _is_found(kind, outcomes[path], outcomes.get(source))
            for kind, path, source in rows
            if kind in kinds
        ]
        return sum(found) / len(found) if found else 1.0

    clean = {path for kind, path, _ in rows if kind is Kind.CLEAN}
    copies = (Kind.CLEAN, Kind.EXACT, *NEAR_KINDS)
    kept = {source for kind, path, source in rows if kind in copies and outcomes[path].kept}
    return Audit(
        exact_recall=recall(Kind.EXACT),
        near_recall=recall(*NEAR_KINDS),
        leak_recall=recall(*LEAK_KINDS),
        corrupt_recall=recall(*CORRUPT_KINDS, Kind.TINY),
        distinct_lost=len(clean - kept) / len(clean) if clean else 0.0,
    )


def _is_found(kind: Kind, outcome: _Outcome, source: _Outcome | None) -> bool:
    if kind in LEAK_KINDS:
        return outcome.reason == Reason.EVALUATION_LEAK
    if kind is Kind.TINY:
        return outcome.reason == Reason.TOO_SMALL
    if kind in CORRUPT_KINDS:
        return outcome.reason not in _REASONS_OF_IMAGES
    assert source is not None, (kind, outcome)
    return outcome.component == source.component and not (outcome.kept and source.kept)
