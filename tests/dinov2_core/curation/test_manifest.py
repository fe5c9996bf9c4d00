"""manifest: counts add up, equal tables are equal files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dinov2_core.curation.manifest import (
    MANIFEST_SCHEMA,
    count_reasons,
    with_changed,
    write_table,
)

TABLE = pa.table({"reason": ["", "too_small", "", "near_copy", ""]})


def test_reasons_are_counted_in_order() -> None:
    assert list(count_reasons(TABLE).items()) == [("near_copy", 1), ("too_small", 1)]


def test_changed_files_are_not_kept() -> None:
    rows = [
        {"uri": uri, "sha256": uri, "size_bytes": 1, "width": 9, "height": 9, "format": "png"}
        | {"kept": kept, "reason": "" if kept else "near_copy"}
        for uri, kept in (("a", True), ("b", False), ("c", True))
    ]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    made = with_changed(table, ["c"])
    assert made["kept"].to_pylist() == [True, False, False]
    assert made["reason"].to_pylist() == ["", "near_copy", "changed"]
    assert made.schema.equals(MANIFEST_SCHEMA)
    assert with_changed(table, []).equals(table)


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    chunked = pa.concat_tables([TABLE.slice(0, 2), TABLE.slice(2)])
    write_table(TABLE, tmp_path / "new" / "a.parquet")
    write_table(chunked, tmp_path / "b.parquet")
    assert (tmp_path / "new" / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.read_table(tmp_path / "b.parquet").equals(TABLE)
