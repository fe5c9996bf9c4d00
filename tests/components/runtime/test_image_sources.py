"""piles: what a folder, a table and a prefix hold."""

from __future__ import annotations

from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.runtime.image_sources import open_source
from dinov2_core.errors import InputError, ObjectUnreadable, StoreRefused


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.png", ".hidden/3.png", "a/.4.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    source = open_source(str(tmp_path))
    items = source.objects()
    assert [item.key for item in items] == ["a/1.png", "b/2.png"]
    assert [source.read(item) for item in items] == [b"a/1.png", b"b/2.png"]
    assert [item.size_bytes for item in items] == [7, 7]


def test_links_are_followed_once_and_a_broken_one_is_listed(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    (real / "1.png").write_bytes(b"1")
    pile = tmp_path / "pile"
    pile.mkdir()
    (pile / "class").symlink_to(real)
    (pile / "loop").symlink_to(pile)
    (pile / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_source(str(pile))
    items = {item.key: item for item in source.objects()}
    assert set(items) == {"class/1.png", "gone.png"}
    assert source.read(items["class/1.png"]) == b"1"
    with pytest.raises(OSError, match="No such file"):
        source.read(items["gone.png"])


def test_a_table_is_known_by_its_content_and_may_hold_structs(tmp_path: Path) -> None:
    path = tmp_path / "labels.pq"
    parquet.write_table(pa.table({"image": [{"bytes": b"one", "path": "1.png"}]}), path)
    source = open_source(str(path))
    assert [source.read(item) for item in source.objects()] == [b"one"]


def test_a_table_of_paths_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": ["1.png"]}), path)
    with pytest.raises(InputError, match="of type string; it must hold the bytes"):
        open_source(str(path))


def test_a_glob_pattern_keeps_keys_relative_to_its_fixed_part(tmp_path: Path) -> None:
    for name in ("x/1.png", "x/y/2.png", "x/3.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    items = open_source(str(tmp_path / "x/**/*.png")).objects()
    assert [item.key for item in items] == ["1.png", "y/2.png"]


def test_rows_of_a_table_are_images(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": [b"one", b"three"]}), path)
    source = open_source(str(path))
    items = source.objects()
    assert [source.read(item) for item in items] == [b"one", b"three"]
    assert [item.size_bytes for item in items] == [3, 5]


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"picture": [b"one"]}), path)
    with pytest.raises(InputError, match="columns picture; a column `image`"):
        open_source(str(path))


def test_a_missing_folder_says_where_to_change_it() -> None:
    with pytest.raises(InputError, match="does not exist; name an existing folder"):
        open_source("/no/such/folder").objects()


def test_an_s3_prefix_lists_all_pages_in_order(s3: str) -> None:
    client = boto3.client("s3")
    names = [f"images/{i:04d}.png" for i in range(1005)]  # more than one page holds
    for name in names:
        client.put_object(Bucket="pile", Key=name, Body=name.encode())
    client.put_object(Bucket="pile", Key="images-of-others/1.png", Body=b"")
    source = open_source("s3://pile/images")
    items = source.objects()
    assert [item.key for item in items] == [name.removeprefix("images/") for name in names]
    assert source.read(items[7]) == b"images/0007.png"


def test_an_object_may_have_any_name_and_be_gone(s3: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket="pile", Key="odd/a#1?.jpg", Body=b"odd")
    client.put_object(Bucket="pile", Key="odd/a", Body=b"another")
    source = open_source("s3://pile/odd")
    items = {item.key: item for item in source.objects()}
    assert source.read(items["a#1?.jpg"]) == b"odd"
    client.delete_object(Bucket="pile", Key="odd/a")
    with pytest.raises(ObjectUnreadable, match="NoSuchKey"):
        source.read(items["a"])


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(StoreRefused, match="NoSuchBucket for s3://nowhere/"):
        open_source("s3://nowhere/x").objects()


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
        open_source("s3://pile/x").objects()
