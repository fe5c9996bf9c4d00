"""Writes embeddings to a Parquet, CSV or NumPy file, by the file's ending."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from dinov2_core.errors import SettingsError

SCHEMA = pa.schema(
    [("uri", pa.string()), ("embedding", pa.list_(pa.float32())), ("error", pa.string())]
)
ENDINGS = (".parquet", ".csv", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image file."""

    uri: str
    """Where it is read from."""
    embedding: NDArray[np.float32] | None = None
    """[D]; None where the file cannot be read."""
    error: str | None = None
    """Why there is none."""


def check_ending(path: Path) -> None:
    """Check that a table can be written to a path.

    Raises:
        SettingsError: Its ending is none of those known.
    """
    if path.suffix not in ENDINGS:
        raise SettingsError(
            f"--output {path} ends in {path.suffix or 'nothing'}; choose a name that ends in "
            f"{', '.join(ENDINGS)}"
        )


@contextmanager
def open_table(path: Path) -> Iterator[Callable[[Sequence[Row]], None]]:
    """A function that appends rows; the file appears when all are written.

    Parquet is written as rows come and has the columns uri, embedding and error. CSV has uri, error
    and a column for each of the D numbers. NumPy has the arrays uri and error [N], and embedding
    [N, D] with NaN where there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".parquet":
        with parquet.ParquetWriter(partial, SCHEMA) as writer:
            yield lambda rows: writer.write_table(_arrow_table(rows))
    else:
        kept: list[Row] = []
        yield kept.extend
        (_write_csv if path.suffix == ".csv" else _write_npz)(partial, kept)
    partial.replace(path)


def _arrow_table(rows: Sequence[Row]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def _matrix(rows: Sequence[Row]) -> NDArray[np.float32]:
    """Embeddings [N, D], NaN where there is none; D is 0 without any."""
    dim = next((len(row.embedding) for row in rows if row.embedding is not None), 0)
    missing = np.full(dim, np.nan, np.float32)
    return np.stack([missing if row.embedding is None else row.embedding for row in rows])


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        matrix = _matrix(rows)
        writer.writerow(["uri", "error", *(f"embedding_{i}" for i in range(matrix.shape[1]))])
        for row, values in zip(rows, matrix, strict=True):
            numbers = [] if row.embedding is None else [f"{value:.9g}" for value in values]
            writer.writerow([row.uri, row.error or "", *numbers])


def _write_npz(path: Path, rows: Sequence[Row]) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            uri=np.array([row.uri for row in rows]),
            embedding=_matrix(rows),
            error=np.array([row.error or "" for row in rows]),
        )
