"""Labelled sets from folders and from parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_core.evaluation.labelled_set import read_labelled_pair, read_labelled_set


def folder(root: Path, files: list[str]) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def parquet(path: Path, *, images: list[Any], labels: Any) -> Path:
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_a_folder_gives_classes_by_name_and_files_by_path(tmp_path: Path) -> None:
    files = ["dog/2.png", "dog/10.png", "cat/x/b.png", "cat/a.png", "cat/.hidden", "README"]
    found = read_labelled_set(folder(tmp_path, [*files, ".git/config"]))
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1]
    names = [image.read().decode() for image in found.images]
    assert names == ["cat/a.png", "cat/x/b.png", "dog/10.png", "dog/2.png"]
    assert found.images[0].name == str(tmp_path / "cat/a.png")


@pytest.mark.parametrize("is_struct", [False, True])
def test_parquet_rows_keep_their_order(tmp_path: Path, is_struct: bool) -> None:
    images: list[Any] = [b"a", b"b", b"c"]
    if is_struct:
        images = [{"bytes": content, "path": None} for content in images]
    path = parquet(tmp_path / "set.parquet", images=images, labels=["two", "one", "two"])
    found = read_labelled_set(path)
    assert found.classes == ("one", "two")
    assert found.labels.tolist() == [1, 0, 1]
    assert [image.read() for image in found.images] == [b"a", b"b", b"c"]
    assert found.images[2].name == f"{path} row 2"


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    found = read_labelled_set(
        parquet(tmp_path / "set.parquet", images=[b"a"] * 3, labels=[10, 9, 10])
    )
    assert found.classes == ("9", "10")
    assert found.labels.tolist() == [1, 0, 1]


def test_dictionary_columns_are_read(tmp_path: Path) -> None:
    labels = pa.array(["b", "a"]).dictionary_encode()
    found = read_labelled_set(parquet(tmp_path / "p", images=[b"1", b"2"], labels=labels))
    assert found.classes == ("a", "b")


def test_a_subset_keeps_the_classes(tmp_path: Path) -> None:
    found = read_labelled_set(folder(tmp_path, ["a/1", "b/1", "b/2"])).subset([2, 0])
    assert len(found) == 2
    assert found.labels.tolist() == [1, 0]
    assert found.classes == ("a", "b")
    assert found.images[0].read() == b"b/2"


def test_differing_classes_are_named(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", ["a/1", "b/1", "c/1"])
    test = folder(tmp_path / "test", ["a/1", "b/1", "d/1"])
    with pytest.raises(ValueError, match=r"only train has \['c'\], only test has \['d'\]"):
        read_labelled_pair(train=train, test=test)
    pair = read_labelled_pair(train=train, test=train)
    assert pair.train.classes == pair.test.classes


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_labelled_set(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folder inside"):
        read_labelled_set(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no image"):
        read_labelled_set(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    path.write_text("image,label")
    with pytest.raises(ValueError, match="no readable parquet file"):
        read_labelled_set(path)
    pq.write_table(pa.table({"img": [b"a"], "label": [1]}), path)
    with pytest.raises(ValueError, match=r"columns \['img', 'label'\]"):
        read_labelled_set(path)
    parquet(path, images=[], labels=[])
    with pytest.raises(ValueError, match="has 0 rows"):
        read_labelled_set(path)


@pytest.mark.parametrize("labels", [[1.5, 2.0], ["a", None]])
def test_every_row_needs_a_label(tmp_path: Path, labels: list[Any]) -> None:
    path = parquet(tmp_path / "set.parquet", images=[b"a", b"b"], labels=labels)
    with pytest.raises(ValueError, match="every row needs a string or an integer"):
        read_labelled_set(path)


@pytest.mark.parametrize("images", [[b"a", None], ["a.png", "b.png"]])
def test_every_row_needs_bytes(tmp_path: Path, images: list[Any]) -> None:
    path = parquet(tmp_path / "set.parquet", images=images, labels=[1, 2])
    with pytest.raises(ValueError, match=r"image of row \d .* not bytes"):
        read_labelled_set(path)
