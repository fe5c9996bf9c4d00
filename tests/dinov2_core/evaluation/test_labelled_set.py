"""Labelled sets, whatever they were read from."""

from __future__ import annotations

import pytest

from dinov2_core.errors import InputError, LabelsMismatch
from dinov2_core.evaluation.labelled_set import (
    EncodedImage,
    LabelledPair,
    LabelledSet,
    evenly_spaced,
    labelled_set,
)


def labelled(labels: list[int] | list[str]) -> LabelledSet:
    images = [EncodedImage(name=str(i), content=b"%d" % i) for i in range(len(labels))]
    return labelled_set(images, labels)


def test_words_are_sorted_as_words_and_numbers_as_numbers() -> None:
    assert labelled(["b", "a", "10", "9"]).classes == ("10", "9", "a", "b")
    found = labelled([10, 9, 10])
    assert found.classes == ("9", "10")
    assert found.labels.tolist() == [1, 0, 1]


def test_a_subset_keeps_the_classes() -> None:
    found = labelled(["a", "b", "b"]).subset([2, 0])
    assert len(found) == 2
    assert found.labels.tolist() == [1, 0]
    assert found.classes == ("a", "b")
    assert found.images[0].read() == b"2"


def test_images_are_read_when_they_are_needed() -> None:
    read: list[str] = []

    def content() -> bytes:
        read.append("a")
        return b"1"

    image = EncodedImage(name="a", content=content)
    assert read == []
    assert image.read() == b"1"


def test_a_part_of_a_set_is_spread_over_it() -> None:
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(3, 4) == [0, 1, 2]
    images = labelled(list(range(100)))
    assert images.evenly_spaced(100) is images
    assert images.evenly_spaced(12).labels.tolist() == evenly_spaced(100, 12)


def test_one_class_is_no_question() -> None:
    with pytest.raises(InputError, match="2 images have 1 classes"):
        labelled(["a", "a"])


def test_pairs_need_the_same_classes() -> None:
    many = [f"class-{i:02d}" for i in range(15)]
    with pytest.raises(LabelsMismatch, match="only train has c, only test has none;"):
        LabelledPair(train=labelled(["a", "b", "c"]), test=labelled(["b", "a"]))
    with pytest.raises(LabelsMismatch, match="only test has class-00, .* class-09 and 5 more;"):
        LabelledPair(train=labelled(["a", "b"]), test=labelled(["a", "b", *many]))
    assert LabelledPair(train=labelled(["a", "b"]), test=labelled(["b", "b", "a"]))
