from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from dinov2_core.errors import SettingsError
from pipelines.model.embedding_table import Row, check_ending, open_table

VECTORS = np.array([[0.1, -2.0], [1e-7, 3.0]], np.float32)
ROWS = [
    Row(uri="a.png", embedding=VECTORS[0]),
    Row(uri="b, c.png", error="truncated: it ends early"),
    Row(uri="d.png", embedding=VECTORS[1]),
]


def written(path: Path, rows: list[Row] = ROWS) -> Path:
    with open_table(path) as write:
        write(rows[:1])
        write(rows[1:])
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]
    return path


def test_parquet_holds_every_row(tmp_path: Path) -> None:
    table = parquet.read_table(written(tmp_path / "x.parquet")).to_pydict()
    assert table["uri"] == ["a.png", "b, c.png", "d.png"]
    assert table["error"] == [None, "truncated: it ends early", None]
    assert table["embedding"][1] is None
    np.testing.assert_array_equal(np.array(table["embedding"][::2], np.float32), VECTORS)


def test_csv_gives_every_bit_back(tmp_path: Path) -> None:
    with written(tmp_path / "x.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["uri", "error", "embedding_0", "embedding_1"]
    assert lines[1] == ["b, c.png", "truncated: it ends early"]
    found = np.array([line[2:] for line in lines[::2]], np.float32)
    np.testing.assert_array_equal(found, VECTORS)


def test_npz_holds_a_matrix(tmp_path: Path) -> None:
    found = np.load(written(tmp_path / "x.npz"))
    assert found["uri"].tolist() == ["a.png", "b, c.png", "d.png"]
    assert found["error"].tolist() == ["", "truncated: it ends early", ""]
    np.testing.assert_array_equal(found["embedding"][::2], VECTORS)
    assert np.isnan(found["embedding"][1]).all()


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".npz"])
def test_a_table_without_any_embedding_is_written(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"x{ending}", [ROWS[1], ROWS[1]])
    assert path.stat().st_size


@pytest.mark.parametrize("name", ["x.txt", "x", "x.csv.gz"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=r"choose a name that ends in \.parquet, \.csv, \.npz"):
        check_ending(Path(name))
