"""Encoded images, and images with labels; where they come from is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov2_core.errors import InputError, LabelsMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An image file as stored, in memory or to be read when it is needed."""

    name: str
    """What an error calls it."""
    content: bytes | Callable[[], bytes]
    """The file's bytes, or what reads them."""

    def read(self) -> bytes:
        """The file's bytes."""
        return self.content if isinstance(self.content, bytes) else self.content()


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSet:
    """Images, their labels and the names that the labels stand for."""

    images: Sequence[EncodedImage]
    """N encoded images in a fixed order."""
    labels: NDArray[np.int64]
    """[N], positions in classes."""
    classes: tuple[str, ...]
    """Class names; numbers are sorted as numbers, words as words."""

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Sequence[int]) -> LabelledSet:
        """The images at these positions, with all classes kept."""
        return LabelledSet(
            images=tuple(self.images[index] for index in indices),
            labels=self.labels[np.asarray(indices, dtype=np.int64)],
            classes=self.classes,
        )

    def evenly_spaced(self, max_images: int) -> LabelledSet:
        """At most so many images, spread over the whole set."""
        return (
            self if len(self) <= max_images else self.subset(evenly_spaced(len(self), max_images))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPair:
    """The labelled images that a classifier is given and those on which it is scored."""

    train: LabelledSet
    test: LabelledSet

    def __post_init__(self) -> None:
        only_train = sorted(set(self.train.classes) - set(self.test.classes))
        only_test = sorted(set(self.test.classes) - set(self.train.classes))
        if only_train or only_test:
            raise LabelsMismatch(
                f"train and test have different classes: only train has {_listed(only_train)}, "
                f"only test has {_listed(only_test)}; give both the same labels"
            )


def labelled_set(images: Sequence[EncodedImage], labels: Sequence[int | str]) -> LabelledSet:
    """Number the classes.

    Args:
        images: N images.
        labels: Their classes [N], all integers or all strings.

    Raises:
        InputError: There are fewer than two classes.
    """
    values, positions = np.unique(np.array(labels), return_inverse=True)
    if len(values) < 2:
        raise InputError(
            f"{len(images)} images have {len(values)} classes; label images of at least two"
        )
    return LabelledSet(
        images=images,
        labels=positions.astype(np.int64),
        classes=tuple(str(value) for value in values.tolist()),
    )


def evenly_spaced(total: int, wanted: int) -> list[int]:
    """At most so many positions in [0, total), from the first to the last."""
    return [int(position) for position in np.linspace(0, total - 1, min(total, wanted)).round()]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
