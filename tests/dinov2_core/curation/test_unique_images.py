"""unique_images: files sorted, equal pixels once."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest

from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.image_files import ImageFiles
from dinov2_core.curation.unique_images import UniqueImages, find_unique_images
from dinov2_core.data.decoding import open_image
from dinov2_core.errors import InputError
from tests.dinov2_core.curation.image_files import MemoryImages, numbered, scanned

NOTHING = numbered([])


def unique(source: ImageFiles, evaluation: ImageFiles = NOTHING) -> UniqueImages:
    return find_unique_images(scanned(source), evaluation=scanned(evaluation))


def test_images_are_kept_once_whatever_their_files(
    demo_images: Callable[[str, int], MemoryImages],
) -> None:
    png = list(demo_images("train", 3).contents)
    buffer = io.BytesIO()
    open_image(png[1], num_channels=3).save(buffer, "BMP")
    source = MemoryImages(
        names=("d", "c", "b", "a"), contents=(png[0], png[1], b"no image", buffer.getvalue())
    )
    made = unique(source, numbered((png[2], b"", png[0])))
    assert made.files["name"].to_pylist() == ["a", "b", "c", "d"]
    assert made.files["reason"].to_pylist() == ["", "not_an_image", "", ""]
    assert made.image_of_file.tolist() == [1, -1, 1, 0]
    assert made.is_evaluation.tolist() == [True, False, True]
    assert len(made.pixel_hashes) == 3
    embedder = PixelEmbedder()
    inputs = [embedder.prepare(open_image(content, num_channels=3)) for content in png]
    np.testing.assert_array_equal(made.embeddings, embedder.embed(inputs))
    assert made.thumbnails.shape == (3, 32, 32)


def test_no_files_are_no_images() -> None:
    made = unique(NOTHING)
    assert len(made.files) == len(made.embeddings) == len(made.thumbnails) == 0


def test_names_must_differ() -> None:
    twins = MemoryImages(names=("b", "a", "c", "a"), contents=(b"",) * 4)
    with pytest.raises(InputError, match="two images are named a; give every file its own name"):
        unique(twins)


def test_an_image_of_an_earlier_block_is_the_same_image(
    demo_images: Callable[[str, int], MemoryImages],
) -> None:
    png = demo_images("train", 3).contents
    made = unique(numbered((png[0], *[b""] * 600, png[1], png[0], png[2])))
    assert made.image_of_file[[0, 601, 602, 603]].tolist() == [0, 1, 0, 2]
    assert len(made.embeddings) == len(made.thumbnails) == 3
