"""collecting: files sorted, pictures once."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest

from dinov2_core.curation.collecting import CollectedImages, collect
from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.looking import looks
from dinov2_core.curation.sources import ImageFiles, MemoryImages
from dinov2_core.data.decoding import open_image


def collected(pile: ImageFiles, evaluation: ImageFiles) -> CollectedImages:
    embedder = PixelEmbedder()
    return collect(looks(pile, embedder=embedder), evaluation=looks(evaluation, embedder=embedder))


def test_pictures_are_kept_once_whatever_their_files(
    demo_images: Callable[[str, int], MemoryImages],
) -> None:
    png = list(demo_images("train", 3).contents)
    buffer = io.BytesIO()
    open_image(png[1], num_channels=3).save(buffer, "BMP")
    pile = MemoryImages(
        names=("d", "c", "b", "a"), contents=(png[0], png[1], b"no image", buffer.getvalue())
    )
    evaluation = MemoryImages(names=("x", "y", "z"), contents=(png[2], b"", png[0]))
    made = collected(pile, evaluation)
    assert [file.name for file in made.pile] == ["a", "b", "c", "d"]
    assert made.pile_pictures.tolist() == [1, -1, 1, 0]
    assert made.is_evaluation.tolist() == [True, False, True]
    assert len(made.picture_hashes) == len(made.embeddings) == 3
    opened = [open_image(content, num_channels=3) for content in png]
    np.testing.assert_array_equal(made.embeddings, PixelEmbedder().embed(opened))
    assert made.thumbnails.shape == (3, 32, 32)


def test_no_files_are_no_trouble() -> None:
    nothing = MemoryImages(names=(), contents=())
    made = collected(nothing, nothing)
    assert len(made.pile) == len(made.embeddings) == len(made.thumbnails) == 0


def test_names_must_differ() -> None:
    twins = MemoryImages(names=("a", "a"), contents=(b"", b""))
    with pytest.raises(ValueError, match="two files of the pile are named a"):
        collected(twins, MemoryImages(names=(), contents=()))


def test_a_picture_of_an_earlier_block_is_the_same_picture(
    demo_images: Callable[[str, int], MemoryImages],
) -> None:
    png = demo_images("train", 3).contents
    contents = (png[0], *[b""] * 600, png[1], png[0], png[2])
    names = [f"{number:04d}" for number in range(len(contents))]
    files = MemoryImages(names=names, contents=contents)
    made = collected(files, MemoryImages(names=(), contents=()))
    assert made.pile_pictures[[0, 601, 602, 603]].tolist() == [0, 1, 0, 2]
    assert len(made.embeddings) == len(made.thumbnails) == 3
