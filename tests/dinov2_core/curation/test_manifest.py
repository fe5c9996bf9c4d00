"""manifest: counts add up, equal tables are equal files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2_core.curation.manifest import ReasonCount, count_reasons, write_table

TABLE = pa.table({"reason": ["", "too_small", "", "near_copy", ""]})


def test_reasons_are_counted_kept_first() -> None:
    assert count_reasons(TABLE) == (
        ReasonCount(reason="", num_images=3),
        ReasonCount(reason="near_copy", num_images=1),
        ReasonCount(reason="too_small", num_images=1),
    )


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    chunked = pa.concat_tables([TABLE.slice(0, 2), TABLE.slice(2)])
    write_table(TABLE, tmp_path / "new" / "a.parquet")
    write_table(chunked, tmp_path / "b.parquet")
    assert (tmp_path / "new" / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.read_table(tmp_path / "b.parquet").equals(TABLE)
