"""Labelled images of any source: a folder for each class, or a table with a column of labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import overload

from components.runtime.image_sources.opening import open_source
from components.runtime.image_sources.source import ImageSource, StoredObject
from dinov2_core.data.decoding import image_format
from dinov2_core.errors import InputError, ObjectUnreadable, UnreadableImage
from dinov2_core.evaluation.labelled_set import (
    EncodedImage,
    LabelledPair,
    LabelledSet,
    labelled_set,
)

NUM_CHECKED = 100
"""Files with unusual endings that are looked into before any work is done."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".jp2", ".avif")


def read_labelled_set(uri: str) -> LabelledSet:
    """List labelled images; their bytes are read when they are needed.

    Args:
        uri: As for `open_source`: a folder or s3:// prefix with one folder per class, whose files
            at any depth are its images and beside which other files are left out, or a Parquet
            file or object with the columns `image` and `label` (strings or integers).

    Raises:
        InputError: There are no labelled images, or they are not as described.
        AccessRefused: The store refuses them.
        TransientError: The store does not answer.
    """
    source = open_source(uri)
    items = source.objects()
    labels = source.labels(items)
    numbers = [number for number, label in enumerate(labels) if label is not None]
    if not numbers:
        raise InputError(
            f"labelled set {uri} has no class folders and no rows; put the images of each class "
            "into a folder that bears the class's name, or name a Parquet file with the columns "
            "`image` and `label`"
        )
    images = _SourceImages(source, items, numbers)
    try:
        return labelled_set(images, [label for label in labels if label is not None])
    except InputError as error:
        raise InputError(f"labelled set {uri}: {error}") from error


def read_labelled_pair(*, train: str, test: str) -> LabelledPair:
    """List a train and a test set of the same classes.

    Raises:
        LabelsMismatch: The classes differ.
        InputError, AccessRefused, TransientError: As for `read_labelled_set`.
    """
    return LabelledPair(train=read_labelled_set(train), test=read_labelled_set(test))


def check_stray_files(images: LabelledSet) -> None:
    """Find files in class folders that are no images, by looking into those of unusual endings.

    Raises:
        InputError: There is such a file.
    """
    unusual = (
        image for image in images.images if PurePosixPath(image.name).suffix.lower() not in ENDINGS
    )
    for image, _ in zip(unusual, range(NUM_CHECKED), strict=False):
        try:
            image_format(image.read())
        except (UnreadableImage, ObjectUnreadable) as error:
            raise InputError(
                f"{image.name} is in a class and is no image ({error}); remove it"
            ) from error


class _SourceImages(Sequence[EncodedImage]):
    """Images of a source, described one by one when they are asked for."""

    def __init__(
        self, source: ImageSource, items: Sequence[StoredObject], numbers: Sequence[int]
    ) -> None:
        self._source = source
        self._items = items
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, position: int) -> EncodedImage: ...

    @overload
    def __getitem__(self, position: slice) -> list[EncodedImage]: ...

    def __getitem__(self, position: int | slice) -> EncodedImage | list[EncodedImage]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        item = self._items[self._numbers[position]]
        return EncodedImage(name=item.uri, content=partial(self._source.read, item))
