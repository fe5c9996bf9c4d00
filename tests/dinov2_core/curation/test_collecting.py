"""collecting: files sorted, pictures once."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation.collecting import CollectedImages, collect
from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.sources import ImageFiles, MemoryImages, no_progress
from dinov2_core.data.decoding import open_image


class Counting(PixelEmbedder):
    """Counts the images it is asked for."""

    def __init__(self) -> None:
        self.num_images = 0

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        self.num_images += len(images)
        return super().embed(images)


def collected(pile: ImageFiles, evaluation: ImageFiles, embedder: PixelEmbedder) -> CollectedImages:
    return collect(
        pile,
        evaluation=evaluation,
        embedder=embedder,
        min_side_pixels=8,
        max_pixels=1_000_000,
        num_threads=2,
        progress=no_progress,
    )


def test_pictures_are_embedded_once_whatever_their_files(
    demo_images: Callable[[str, int], MemoryImages],
) -> None:
    png = list(demo_images("train", 3).contents)
    buffer = io.BytesIO()
    open_image(png[1], num_channels=3).save(buffer, "BMP")
    pile = MemoryImages(
        names=("d", "c", "b", "a"), contents=(png[0], png[1], b"no image", buffer.getvalue())
    )
    evaluation = MemoryImages(names=("x", "y", "z"), contents=(png[2], b"", png[0]))
    embedder = Counting()
    made = collected(pile, evaluation, embedder)
    assert [file.name for file in made.pile] == ["a", "b", "c", "d"]
    assert made.pile_pictures.tolist() == [1, -1, 1, 0]
    assert made.is_evaluation.tolist() == [True, False, True]
    assert embedder.num_images == 3
    opened = [open_image(content, num_channels=3) for content in png]
    np.testing.assert_array_equal(made.embeddings, PixelEmbedder().embed(opened))
    assert made.thumbnails.shape == (3, 32, 32)


def test_no_files_are_no_trouble() -> None:
    nothing = MemoryImages(names=(), contents=())
    made = collected(nothing, nothing, PixelEmbedder())
    assert len(made.pile) == len(made.embeddings) == len(made.thumbnails) == 0


def test_names_must_differ() -> None:
    twins = MemoryImages(names=("a", "a"), contents=(b"", b""))
    with pytest.raises(ValueError, match="two files of the pile are named a"):
        collected(twins, MemoryImages(names=(), contents=()), PixelEmbedder())
