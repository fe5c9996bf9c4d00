"""alignment: crops are found, similar images are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation.alignment import find_aligned_copies, thumbnail
from dinov2_core.curation.deduplication import Edges, make_edges
from dinov2_core.data.decoding import open_image
from tests.dinov2_core.curation.image_files import MemoryImages

NO_PAIRS = make_edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def align(images: list[Image.Image], proposals: Edges = NO_PAIRS) -> Edges:
    return find_aligned_copies(
        np.stack([thumbnail(image) for image in images]),
        proposals=proposals,
        candidate_threshold=0.85,
        edge_threshold=0.97,
    )


@pytest.fixture
def images(demo_images: Callable[[str, int], MemoryImages]) -> list[Image.Image]:
    files = demo_images("train", 200)
    return [open_image(files.read(i), num_channels=3) for i in range(200)]


@pytest.mark.parametrize(
    "box", [(0, 0, 28, 28), (0, 0, 24, 24), (4, 4, 28, 28), (3, 0, 27, 26), (2, 2, 26, 27)]
)
def test_crops_are_joined_with_their_original(
    images: list[Image.Image], box: tuple[int, int, int, int]
) -> None:
    copies = [image.crop(box) for image in images[:20]]
    edges = align(images + copies)
    found = set(zip(edges.first.tolist(), edges.second.tolist(), strict=True))
    expected = {(i, 200 + i) for i in range(20)}
    assert len(found & expected) >= 19
    assert len(found - expected) <= 2


def test_distinct_images_stay_apart(images: list[Image.Image]) -> None:
    assert len(align(images)) <= 2


def test_brightness_and_size_do_not_count(images: list[Image.Image]) -> None:
    darker = images[0].point(lambda value: value // 2)
    larger = images[1].resize((90, 70), Image.Resampling.BICUBIC)
    edges = align([*images, darker, larger])
    found = set(zip(edges.first.tolist(), edges.second.tolist(), strict=True))
    assert {(0, 200), (1, 201)} <= found


def test_proposed_pairs_are_compared(images: list[Image.Image]) -> None:
    proposed = make_edges(np.array([0]), np.array([1]), np.ones(1, dtype=np.float32))
    assert len(align(images, proposed)) == len(align(images))


def test_flat_and_few_images_have_no_copies() -> None:
    flat: NDArray[np.uint8] = np.full((3, 32, 32), 9, dtype=np.uint8)
    for thumbnails in (flat, flat[:1], flat[:0]):
        edges = find_aligned_copies(
            thumbnails, proposals=NO_PAIRS, candidate_threshold=0.85, edge_threshold=0.97
        )
        assert len(edges) == 0
