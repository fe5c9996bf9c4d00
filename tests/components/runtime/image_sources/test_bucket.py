"""Objects of S3 prefixes."""

from __future__ import annotations

import io
from pathlib import Path

import boto3
import pytest

from components.runtime import s3 as store
from components.runtime.image_sources.bucket import BucketSource, RemoteFile
from components.runtime.image_sources.source import StoredObject
from dinov2_core.errors import ObjectUnreadable, StoreRefused


def test_a_prefix_lists_all_pages_in_order(s3: str) -> None:
    client = boto3.client("s3")
    names = [f"images/{i:04d}.png" for i in range(1005)]  # more than one page holds
    for name in names:
        client.put_object(Bucket="pile", Key=name, Body=name.encode())
    client.put_object(Bucket="pile", Key="images-of-others/1.png", Body=b"")
    source = BucketSource("s3://pile/images")
    items = source.objects()
    assert [item.key for item in items] == [name.removeprefix("images/") for name in names]
    assert source.read(items[7]) == b"images/0007.png"


def test_an_object_may_have_any_name_and_be_gone(s3: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket="pile", Key="odd/a#1?.jpg", Body=b"odd")
    client.put_object(Bucket="pile", Key="odd/a", Body=b"another")
    client.put_object(Bucket="pile", Key="odd/class/b", Body=b"labelled")
    source = BucketSource("s3://pile/odd")
    items = {item.key: item for item in source.objects()}
    assert source.labels(list(items.values())) == [None, None, "class"]
    assert source.read(items["a#1?.jpg"]) == b"odd"
    client.delete_object(Bucket="pile", Key="odd/a")
    with pytest.raises(ObjectUnreadable, match="NoSuchKey"):
        source.read(items["a"])


def test_an_object_that_is_too_large_for_an_image_is_not_asked_for() -> None:
    item = StoredObject(key="a", uri="s3://pile/a", size_bytes=6 * 10**9, etag="e")
    with pytest.raises(ObjectUnreadable, match="has 6000000000 bytes"):
        BucketSource("s3://pile").read(item)


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(StoreRefused, match="NoSuchBucket for s3://nowhere/"):
        BucketSource("s3://nowhere/x").objects()


def test_missing_credentials_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StoreRefused, match="no S3 credentials for s3://pile/.*set AWS_ACCESS_KEY_ID"
    ):
        BucketSource("s3://pile/x").objects()


def test_a_remote_file_reads_like_a_local_one_until_it_is_replaced(s3: str) -> None:
    client = boto3.client("s3")
    content = bytes(range(256))
    client.put_object(Bucket="pile", Key="a.bin", Body=content)
    found = store.find("s3://pile/a.bin")
    assert found is not None
    local, remote = io.BytesIO(content), RemoteFile(found)
    for offset, whence, size in ((0, 0, 10), (5, 1, 300), (-20, 2, 7), (250, 0, 100), (999, 0, 1)):
        assert remote.seek(offset, whence) == local.seek(offset, whence)
        assert remote.read(size) == local.read(size)
        assert remote.tell() == local.tell()
    client.put_object(Bucket="pile", Key="a.bin", Body=content[::-1])
    remote.seek(0)
    with pytest.raises(ObjectUnreadable, match=r"s3://pile/a.bin was replaced while it was read"):
        remote.read(1)
