"""Images with labels, read from one folder per class or from a parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinov2_core.evaluation.preprocessing import EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSet:
    """Images, their labels and the names that the labels stand for."""

    images: tuple[EncodedImage, ...]
    """N encoded images in a fixed order."""
    labels: NDArray[np.int64]
    """[N], positions in classes."""
    classes: tuple[str, ...]
    """Class names; numbers are sorted as numbers, words as words."""

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int]) -> LabelledSet:
        """Return the images at these positions, with all classes kept."""
        return LabelledSet(
            images=tuple(self.images[index] for index in indices),
            labels=self.labels[np.asarray(indices, dtype=np.int64)],
            classes=self.classes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPair:
    """The labelled images that a classifier sees and those on which it is scored."""

    train: LabelledSet
    test: LabelledSet


def read_labelled_set(path: Path) -> LabelledSet:
    """Read a folder with one folder per class, or a parquet file with image and label.

    A class folder may have folders of its own; hidden files are passed over, as are files beside
    the class folders. A parquet file has the columns `image` (bytes, or a struct with the field
    bytes) and `label` (string or integer); its bytes stay in memory.

    Raises:
        ValueError: The path has no labelled images, or a file is not as described.
    """
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_parquet(path)
    raise ValueError(
        f"labelled set {path} does not exist; give a folder with one folder per class, or a "
        "parquet file with the columns image and label"
    )


def read_labelled_pair(*, train: Path, test: Path) -> LabelledPair:
    """Read the train and the test set and hold them to the same classes.

    Raises:
        ValueError: A set is unreadable, or the classes differ; the message names the differing.
    """
    pair = LabelledPair(train=read_labelled_set(train), test=read_labelled_set(test))
    if pair.train.classes != pair.test.classes:
        only_train = sorted(set(pair.train.classes) - set(pair.test.classes))
        only_test = sorted(set(pair.test.classes) - set(pair.train.classes))
        raise ValueError(
            f"train set {train} and test set {test} have different classes: only train has "
            f"{only_train}, only test has {only_test}; give both the same labels"
        )
    return pair


def _from_folder(folder: Path) -> LabelledSet:
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise ValueError(
            f"labelled set {folder} has no folder inside; put the images of each class into a "
            "folder that bears the class's name"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(
            file
            for file in (folder / name).rglob("*")
            if file.is_file() and not file.name.startswith(".")
        )
        if not found:
            raise ValueError(
                f"class folder {folder / name} has no image; add images or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    return LabelledSet(
        images=tuple(EncodedImage(name=str(file), content=file) for file in files),
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(names),
    )


def _from_parquet(path: Path) -> LabelledSet:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"labelled set {path} is no readable parquet file: {error}; write it with the columns "
            "image (bytes) and label (string or integer), or give a folder"
        ) from error
    missing = {"image", "label"} - set(table.column_names)
    if missing or not table.num_rows:
        raise ValueError(
            f"labelled set {path} has {table.num_rows} rows and the columns {table.column_names}; "
            "it needs rows, and the columns image (bytes) and label (string or integer)"
        )
    values = _label_values(table, path=path)
    classes = np.unique(np.array(values)).tolist()
    position = {value: index for index, value in enumerate(classes)}
    return LabelledSet(
        images=_image_cells(table, path=path),
        labels=np.array([position[value] for value in values], dtype=np.int64),
        classes=tuple(str(value) for value in classes),
    )


def _label_values(table: pa.Table, *, path: Path) -> list[int | str]:
    """Return the labels of all rows, either all integers or all strings."""
    column = table.column("label").combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_known = (
        pa.types.is_integer(column.type)
        or pa.types.is_string(column.type)
        or pa.types.is_large_string(column.type)
    )
    if not is_known or column.null_count:
        raise ValueError(
            f"column label of {path} has type {column.type} and {column.null_count} empty rows; "
            "every row needs a string or an integer"
        )
    values: list[int | str] = column.to_pylist()
    return values


def _image_cells(table: pa.Table, *, path: Path) -> tuple[EncodedImage, ...]:
    images = []
    for row, cell in enumerate(table.column("image").to_pylist()):
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise ValueError(
                f"image of row {row} of {path} is {type(content).__name__}, not bytes; store the "
                "image file's bytes in every row"
            )
        images.append(EncodedImage(name=f"{path} row {row}", content=content))
    return tuple(images)
