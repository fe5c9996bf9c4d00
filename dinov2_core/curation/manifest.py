"""The table that curation leaves: one row per file, kept or dropped for a reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


class Removal(StrEnum):
    """Why a sound image was dropped; refusals of `scanning` are the other reasons."""

    EXACT_COPY = "exact_copy"
    """Same pixels as a better or equal file."""
    NEAR_COPY = "near_copy"
    """Another image of its component stands for it."""
    EVALUATION_LEAK = "evaluation_leak"
    """Its component touches an evaluation image."""
    NOT_RETRIEVED = "not_retrieved"
    """No seed image called it up."""


MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("component", pa.int64()),
        pa.field("component_size", pa.int64()),
        pa.field("representative", pa.string()),
        pa.field("nearest", pa.string()),
        pa.field("nearest_similarity", pa.float32()),
        pa.field("evaluation_similarity", pa.float32()),
    ]
)
"""Rows sorted by uri. `reason` is empty for kept images. `component` to `nearest` are null for
refused files. `representative` and `nearest` are uris; `nearest_similarity` and
`evaluation_similarity` (to the nearest image of the pile, of the evaluation set) are null where no
edge was found, 1 for equal pixels."""

EDGE_SCHEMA = pa.schema(
    [
        pa.field("first", pa.string(), nullable=False),
        pa.field("second", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
    ]
)
"""Pairs of pixel hashes, each once; also below the thresholds, so that these can change later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonCount:
    """How many files share one fate."""

    reason: str
    """Empty for kept."""
    num_images: int


def count_reasons(manifest: pa.Table) -> tuple[ReasonCount, ...]:
    """Files per reason, sorted by reason, kept ones (empty reason) first; sums to the rows."""
    counts = pc.value_counts(manifest["reason"])
    pairs = sorted((entry["values"], entry["counts"]) for entry in counts.to_pylist())
    return tuple(ReasonCount(reason=reason, num_images=number) for reason, number in pairs)


def write_table(table: pa.Table, path: Path) -> None:
    """Write parquet, all of it or nothing; equal tables give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table.combine_chunks(), temporary, compression="zstd", row_group_size=1 << 17)
    temporary.replace(path)
