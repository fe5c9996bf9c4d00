"""Which source a URI names."""

from __future__ import annotations

import io
import os
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.runtime.image_sources.bucket import BucketSource
from components.runtime.image_sources.folder import FolderSource
from components.runtime.image_sources.opening import open_source
from components.runtime.image_sources.source import content_digest
from components.runtime.image_sources.table import TableSource


def table_bytes() -> bytes:
    buffer = io.BytesIO()
    images = [b"%d" % number * 1000 for number in range(100)]
    parquet.write_table(pa.table({"image": images}), buffer, row_group_size=30)
    return buffer.getvalue()


def test_a_table_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(table_bytes())
    (tmp_path / "b.parquet").write_bytes(b"text")
    (tmp_path / "x.parquet").mkdir()
    assert isinstance(open_source(str(tmp_path / "a.jpg")), TableSource)
    for name in ("", "b.parquet", "x.parquet", "*.jpg"):
        assert isinstance(open_source(str(tmp_path / name)), FolderSource)


@pytest.mark.timeout(20)
def test_a_pipe_is_not_opened_to_see_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (item,) = open_source(str(tmp_path / "pipe")).objects()
    assert item.key == "pipe"


def test_a_remote_table_is_read_in_parts(s3: str, tmp_path: Path) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket="pile", Key="sets/a", Body=table_bytes())
    client.put_object(Bucket="pile", Key="sets/b.parquet/1.png", Body=b"")
    (tmp_path / "a").write_bytes(table_bytes())
    remote, local = open_source("s3://pile/sets/a"), open_source(str(tmp_path / "a"))
    assert isinstance(remote, TableSource)
    pairs = list(zip(remote.objects(), local.objects(), strict=True))
    assert [remote.read(item) for item, _ in pairs] == [local.read(item) for _, item in pairs]
    etag = client.head_object(Bucket="pile", Key="sets/a")["ETag"]
    assert content_digest(remote, pairs[0][0]) == f"0-{etag}"
    for uri in ("s3://pile", "s3://pile/", "s3://pile/sets", "s3://pile/sets/b.parquet"):
        assert isinstance(open_source(uri), BucketSource)
