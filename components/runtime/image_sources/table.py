"""Rows of a Parquet file whose column `image` holds the bytes of image files."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from io import RawIOBase
from itertools import accumulate
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from components.runtime.image_sources.source import Label, StoredObject
from dinov2_core.errors import InputError

BATCH_ROWS = 16
"""Rows that are decoded at a time."""
NUM_BATCHES = 3
"""Decoded batches that stay in memory, for threads that read neighbouring rows."""
BUFFER_BYTES = 8 * 2**20
"""What is read of the file at a time."""


class TableSource:
    """Rows of a Parquet file, decoded a few at a time.

    Rows that are read in ascending order are decoded once; a step back decodes again from the
    start of the row group.
    """

    def __init__(self, uri: str, *, file: Path | RawIOBase, etag: str = "") -> None:
        """Read the schema.

        Args:
            uri: What messages call it.
            file: Where it is read.
            etag: Of the object that it lies in; empty for a local file.

        Raises:
            InputError: It is no Parquet file or has no column of images.
        """
        self._uri = uri
        self._etag = etag
        self._file = _opened(uri, file)
        self._column = self._image_column()
        groups = (self._file.metadata.row_group(i) for i in range(self._file.num_row_groups))
        self._group_ends = list(accumulate(group.num_rows for group in groups))
        self._lock = threading.Lock()
        self._group = -1
        self._next_row = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._recent: deque[tuple[range, pa.Array]] = deque(maxlen=NUM_BATCHES)

    def objects(self) -> Sequence[StoredObject]:
        """One object per row, in the order of the file; nothing of the rows is read."""
        return _Rows(self._uri, num_rows=self._file.metadata.num_rows, etag=self._etag)

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one row; none where the row is empty."""
        row = int(item.uri.rpartition("#")[2])
        with self._lock:
            while True:
                for rows, cells in self._recent:
                    if row in rows:
                        content: bytes = cells[row - rows.start].as_py() or b""
                        return content
                self._decode_towards(row)

    def labels(self, items: Sequence[StoredObject]) -> Sequence[Label | None]:
        """The column `label`: strings or integers."""
        names = self._file.schema_arrow.names
        if "label" not in names:
            raise InputError(
                f"{self._uri} has columns {', '.join(names)}; columns `image` and `label` are "
                "needed"
            )
        kind = self._file.schema_arrow.field("label").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        labels: list[Label | None] = []
        for batch in self._file.iter_batches(columns=["label"]):
            labels += batch.column(0).to_pylist()
        is_known = any(
            is_of(kind)
            for is_of in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
        )
        assert len(labels) == len(items), (self._uri, len(labels), len(items))
        if not is_known or None in labels:
            raise InputError(
                f"column `label` of {self._uri} has type {kind} and {labels.count(None)} empty "
                "rows; every row needs a string or an integer"
            )
        num_empty = self._num_rows_without_image()
        if num_empty:
            raise InputError(
                f"{num_empty} of {len(labels)} rows of {self._uri} have no image; every row needs "
                "the bytes of an image file"
            )
        return labels

    def _image_column(self) -> str:
        """Path of the column that holds the bytes."""
        schema = self._file.schema_arrow
        if "image" not in schema.names:
            raise InputError(
                f"{self._uri} has columns {', '.join(schema.names)}; a column `image` with the "
                f"bytes of image files is needed"
            )
        column, kind = "image", schema.field("image").type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            column, kind = "image.bytes", kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise InputError(
                f"{self._uri} has a column `image` of type {kind}; it must hold the bytes of "
                f"image files, or structs with a field `bytes`"
            )
        return column

    def _num_rows_without_image(self) -> int:
        """As far as the file's own statistics tell."""
        metadata, count = self._file.metadata, 0
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                if column.path_in_schema == self._column and column.is_stats_set:
                    count += column.statistics.null_count or 0
        return count

    def _decode_towards(self, row: int) -> None:
        """Decode the next rows, or the first ones of the row's group if that is not at hand."""
        group = bisect_right(self._group_ends, row)
        if group != self._group or row < self._next_row:
            self._group = group
            self._next_row = self._group_ends[group - 1] if group else 0
            self._batches = self._file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        cells = next(self._batches).column(0)
        if pa.types.is_struct(cells.type):
            cells = compute.struct_field(cells, "bytes")
        rows = range(self._next_row, self._next_row + len(cells))
        self._recent.append((rows, cells))
        self._next_row = rows.stop


class _Rows(Sequence[StoredObject]):
    """Descriptions of all rows, made when asked for: a table may have a hundred million."""

    def __init__(self, uri: str, *, num_rows: int, etag: str) -> None:
        self._uri = uri
        self._num_rows = num_rows
        self._etag = etag

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, row: int) -> StoredObject: ...

    @overload
    def __getitem__(self, row: slice) -> list[StoredObject]: ...

    def __getitem__(self, row: int | slice) -> StoredObject | list[StoredObject]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(self._num_rows))]
        number = range(self._num_rows)[row]
        return StoredObject(
            key=f"row_{number:09d}", uri=f"{self._uri}#{number}", size_bytes=0, etag=self._etag
        )


def _opened(uri: str, file: Path | RawIOBase) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{uri} is not a readable Parquet file; name a file with a column `image`"
        ) from error
