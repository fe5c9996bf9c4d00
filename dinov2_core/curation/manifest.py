"""The table that curation writes: one row per file, kept or dropped for a reason."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


class Reason(StrEnum):
    """Why a file is not kept."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    DAMAGED = "damaged"
    """A JPEG that decodes, but not as it was encoded."""
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_SCANS = "too_many_scans"
    """A progressive JPEG that takes seconds to decode."""
    TOO_SMALL = "too_small"
    READ_FAILED = "read_failed"
    """Storage, permissions or names, not the image."""
    EXACT_COPY = "exact_copy"
    """Same pixels as a better or equal file."""
    NEAR_COPY = "near_copy"
    """Another image of its component is kept."""
    EVALUATION_LEAK = "evaluation_leak"
    """Its component holds or touches an evaluation image."""
    NOT_RETRIEVED = "not_retrieved"
    """No seed image has it, or a copy of it, among its nearest images."""
    CHANGED = "changed"
    """Its content was another, or gone, when it was to be copied."""


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
files that are no usable images. `representative` and `nearest` are uris; `nearest_similarity` and
`evaluation_similarity` (to the nearest source image, to the nearest evaluation image) are null
where no edge was found, 1 for equal pixels."""

EDGE_SCHEMA = pa.schema(
    [
        pa.field("first", pa.string(), nullable=False),
        pa.field("second", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
    ]
)
"""Pairs of pixel hashes, each once; also below the thresholds, so that these can change later."""


def count_reasons(manifest: pa.Table) -> dict[str, int]:
    """Files that are not kept by reason, sorted."""
    counts = pc.value_counts(manifest["reason"]).to_pylist()
    return dict(sorted((one["values"], one["counts"]) for one in counts if one["values"]))


def with_changed(manifest: pa.Table, uris: list[str]) -> pa.Table:
    """The manifest with some kept files dropped as changed."""
    is_changed = pc.is_in(manifest["uri"], value_set=pa.array(uris, pa.string()))
    columns = {
        "kept": pc.and_not(manifest["kept"], is_changed),
        "reason": pc.if_else(is_changed, Reason.CHANGED.value, manifest["reason"]),
    }
    for name, values in columns.items():
        number = manifest.schema.get_field_index(name)
        manifest = manifest.set_column(number, manifest.schema.field(number), values)
    return manifest


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet, all of it or nothing; equal tables give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table.combine_chunks(), temporary, compression="zstd", row_group_size=1 << 17)
    temporary.replace(path)
