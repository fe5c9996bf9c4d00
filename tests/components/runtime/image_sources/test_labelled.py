"""Labelled sets of every source."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from components.runtime.image_sources.labelled import (
    check_stray_files,
    read_labelled_pair,
    read_labelled_set,
)
from dinov2_core.errors import InputError, LabelsMismatch


def folder(root: Path, files: list[str]) -> str:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def table(path: Path, *, images: Any, labels: Any) -> str:
    parquet.write_table(pa.table({"image": images, "label": labels}), path)
    return str(path)


def test_a_folder_gives_classes_by_name_and_files_by_path(tmp_path: Path) -> None:
    files = ["dog/2.png", "dog/10.png", "cat/x/b.png", "cat/a.png", "cat/.hidden", "README"]
    found = read_labelled_set(folder(tmp_path, [*files, ".git/config"]))
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    names = [image.read().decode() for image in found.images]
    assert names == ["cat/a.png", "cat/x/b.png", "dog/10.png", "dog/2.png"]
    assert found.images[0].name == str(tmp_path / "cat/a.png")


@pytest.mark.parametrize("is_struct", [False, True])
def test_rows_of_a_table_keep_their_order(tmp_path: Path, is_struct: bool) -> None:
    images: list[Any] = [b"a", b"b", b"c"]
    if is_struct:
        images = [{"bytes": content, "path": None} for content in images]
    path = table(tmp_path / "set.parquet", images=images, labels=["two", "one", "two"])
    found = read_labelled_set(path)
    assert found.classes == ("one", "two")
    assert found.labels.tolist() == [1, 0, 1]
    assert [image.read() for image in found.images] == [b"a", b"b", b"c"]
    assert found.images[2].name == f"{path}#2"


def test_a_prefix_and_a_remote_table_are_labelled_sets_like_local_ones(
    s3: str, tmp_path: Path
) -> None:
    local_folder = folder(tmp_path / "set", ["dog/2.png", "cat/x/b.png", "cat/a.png", "README"])
    local_table = table(tmp_path / "t", images=[b"1", b"2"], labels=[9, 10])
    client = boto3.client("s3")
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "pile", path.relative_to(tmp_path).as_posix())
    for local, remote in ((local_folder, "s3://pile/set"), (local_table, "s3://pile/t")):
        here, there = read_labelled_set(local), read_labelled_set(remote)
        assert there.classes == here.classes
        assert there.labels.tolist() == here.labels.tolist()
        assert [image.read() for image in there.images] == [image.read() for image in here.images]


def test_differing_classes_are_named(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", ["a/1", "b/1", "c/1"])
    test = folder(tmp_path / "test", ["a/1", "b/1", "d/1"])
    with pytest.raises(LabelsMismatch, match="only train has c, only test has d;"):
        read_labelled_pair(train=train, test=test)
    pair = read_labelled_pair(train=train, test=train)
    assert pair.train.classes == pair.test.classes


def test_what_has_no_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_labelled_set(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has no class folders"):
        read_labelled_set(str(tmp_path))
    with pytest.raises(InputError, match="has no class folders and no rows"):
        images, labels = pa.array([], pa.binary()), pa.array([], pa.string())
        read_labelled_set(table(tmp_path / "t", images=images, labels=labels))
    with pytest.raises(InputError, match="1 images have 1 classes; label images of at least two"):
        read_labelled_set(folder(tmp_path / "one", ["a/1.png"]))


def test_files_that_are_no_images_are_found_by_their_endings(tmp_path: Path) -> None:
    root = Path(folder(tmp_path, ["a/1.png", "b/2.jpeg"]))
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    (root / "a/image-without-ending").write_bytes(buffer.getvalue())
    check_stray_files(read_labelled_set(str(root)))
    (root / "b/notes.txt").write_text("see the other folder")
    with pytest.raises(InputError, match=r"b/notes.txt is in a class and is no image .*; remove"):
        check_stray_files(read_labelled_set(str(root)))
