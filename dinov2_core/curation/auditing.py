"""Auditing: how much of what was planted did curation find, and what did it cost."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from dinov2_core.curation.manifest import Removal
from dinov2_core.curation.planting import CORRUPT_KINDS, LEAK_KINDS, NEAR_KINDS, Kind
from dinov2_core.curation.scanning import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Found of planted."""

    found: int
    planted: int

    @property
    def share(self) -> float:
        """Between 0 and 1; 1 where nothing was planted."""
        return self.found / self.planted if self.planted else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What curation made of the planted defects."""

    exact: Recall
    """Exact copies that share a component with their source, at most one of them kept."""
    reencoded: Recall
    resized: Recall
    cropped: Recall
    leaks: Recall
    """Copies of evaluation images dropped as leaks."""
    corrupt: Recall
    """Broken files refused with a reason."""
    tiny: Recall
    """1 x 1 images refused as too small."""
    num_distinct: int
    """Clean images."""
    num_distinct_lost: int
    """Clean images of which neither they nor a planted copy was kept."""

    @property
    def near(self) -> Recall:
        """All near copies together."""
        parts = (self.reencoded, self.resized, self.cropped)
        return Recall(
            found=sum(part.found for part in parts), planted=sum(part.planted for part in parts)
        )

    @property
    def lost_share(self) -> float:
        """Of the distinct images."""
        return self.num_distinct_lost / self.num_distinct if self.num_distinct else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fate:
    kept: bool
    reason: str
    component: int | None


def audit(manifest: pa.Table, truth: pa.Table) -> Audit:
    """Compare a manifest with what was planted.

    Args:
        manifest: Of the planted pile, its uris being the truth's paths.
        truth: `TRUTH_SCHEMA` of `planting`.
    """
    fates = {
        uri: _Fate(kept=kept, reason=reason, component=component)
        for uri, kept, reason, component in zip(
            *(manifest[c].to_pylist() for c in ("uri", "kept", "reason", "component")), strict=True
        )
    }
    rows = [(Kind(row["kind"]), row["path"], row["source"]) for row in truth.to_pylist()]
    missing = [path for _, path, _ in rows if path not in fates]
    if missing:
        raise ValueError(
            f"{len(missing)} planted files are not in the manifest, e.g. {missing[0]}; curate the "
            "folder that the truth belongs to"
        )

    def recall(*kinds: Kind) -> Recall:
        of_kind = [(kind, path, source) for kind, path, source in rows if kind in kinds]
        found = sum(
            _is_found(kind, fates[path], fates.get(source)) for kind, path, source in of_kind
        )
        return Recall(found=found, planted=len(of_kind))

    clean = {path for kind, path, _ in rows if kind is Kind.CLEAN}
    families = (Kind.CLEAN, Kind.EXACT, *NEAR_KINDS)
    alive = {source for kind, path, source in rows if kind in families and fates[path].kept}
    return Audit(
        exact=recall(Kind.EXACT),
        reencoded=recall(Kind.REENCODED),
        resized=recall(Kind.RESIZED),
        cropped=recall(Kind.CROPPED),
        leaks=recall(*LEAK_KINDS),
        corrupt=recall(*CORRUPT_KINDS),
        tiny=recall(Kind.TINY),
        num_distinct=len(clean),
        num_distinct_lost=len(clean - alive),
    )


def _is_found(kind: Kind, fate: _Fate, source: _Fate | None) -> bool:
    if kind in LEAK_KINDS:
        return fate.reason == Removal.EVALUATION_LEAK
    if kind is Kind.TINY:
        return fate.reason == Refusal.TOO_SMALL
    if kind in CORRUPT_KINDS:
        return not fate.kept and fate.reason in set(Refusal)
    assert source is not None, (kind, fate)
    return fate.component == source.component and not (fate.kept and source.kept)
