"""Rows of Parquet files."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.runtime.image_sources.table import TableSource
from dinov2_core.errors import InputError


def table(path: Path, *, rows_per_group: int = 1 << 20, **columns: Any) -> TableSource:
    parquet.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return TableSource(str(path), file=path)


def test_rows_are_images_in_any_order(tmp_path: Path) -> None:
    contents = [b"%d" % number for number in range(1000)]
    source = table(tmp_path / "t.parquet", rows_per_group=300, image=contents)
    items = source.objects()
    assert len(items) == 1000
    assert items[7].key == "row_000000007"
    assert items[-1].uri == f"{tmp_path}/t.parquet#999"
    assert [item.key for item in items[2:4]] == ["row_000000002", "row_000000003"]
    with pytest.raises(IndexError):
        items[1000]
    for order in (range(1000), range(999, -1, -97), (0, 640, 650, 3, 999, 299, 300)):
        assert [source.read(items[row]) for row in order] == [contents[row] for row in order]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, items)) == contents


def test_images_may_be_structs_and_empty(tmp_path: Path) -> None:
    rows = [{"bytes": b"one", "path": "1.png"}, {"bytes": None, "path": "2.png"}, None]
    source = table(tmp_path / "labels.pq", image=rows)
    assert [source.read(item) for item in source.objects()] == [b"one", b"", b""]


def test_a_small_file_of_large_images_stays_small_in_memory(tmp_path: Path) -> None:
    """2,000 equal images of a megabyte: a file of a few megabytes, two gibibytes when decoded."""
    path = tmp_path / "t.parquet"
    image = pa.array([bytes(2**20)])
    with parquet.ParquetWriter(path, pa.schema([("image", pa.binary())])) as writer:
        for _ in range(20):
            writer.write_table(pa.table({"image": pa.concat_arrays([image] * 100)}))
    assert path.stat().st_size < 15e6
    program = """
import resource, sys
from pathlib import Path
from components.runtime.image_sources.table import TableSource
source = TableSource(sys.argv[1], file=Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(len(source.read(item)) for item in source.objects())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    total, kibibytes = map(int, ended.stdout.split())
    assert total == 2000 * 2**20
    assert kibibytes < 400 * 2**10


def test_other_columns_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(InputError, match="columns picture; a column `image`"):
        table(path, picture=[b"one"])
    with pytest.raises(InputError, match="of type string; it must hold the bytes"):
        table(path, image=["1.png"])
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="is not a readable Parquet file"):
        TableSource(str(path), file=path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a"], ["b", "a"]),
        ([10, 9], [10, 9]),
        (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
    ],
)
def test_labels_are_strings_or_integers(tmp_path: Path, labels: Any, expected: list[Any]) -> None:
    source = table(tmp_path / "t.parquet", image=[b"1", b"2"], label=labels)
    assert source.labels(source.objects()) == expected


@pytest.mark.parametrize("labels", [[1.5, 2.0], ["a", None]])
def test_every_row_needs_a_label(tmp_path: Path, labels: list[Any]) -> None:
    source = table(tmp_path / "t.parquet", image=[b"a", b"b"], label=labels)
    with pytest.raises(InputError, match="every row needs a string or an integer"):
        source.labels(source.objects())


@pytest.mark.parametrize("empty", [None, {"bytes": None}])
def test_every_labelled_row_needs_an_image(tmp_path: Path, empty: Any) -> None:
    images = [b"a", None] if empty is None else [{"bytes": b"a"}, empty]
    source = table(tmp_path / "t.parquet", image=images, label=[1, 2])
    with pytest.raises(InputError, match="1 of 2 rows of .* have no image"):
        source.labels(source.objects())
    unlabelled = table(tmp_path / "u.parquet", image=images)
    with pytest.raises(InputError, match="has columns image; columns `image` and `label`"):
        unlabelled.labels(unlabelled.objects())
