"""registration: crops are found, look-alikes are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation.deduplication import Edges, make_edges
from dinov2_core.curation.registration import register_copies, thumbnail
from dinov2_core.curation.sources import MemoryImages
from dinov2_core.data.decoding import open_image

NO_PAIRS = make_edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def register(images: list[Image.Image], proposals: Edges = NO_PAIRS) -> Edges:
    return register_copies(
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
    edges = register(images + copies)
    found = set(zip(edges.first.tolist(), edges.second.tolist(), strict=True))
    expected = {(i, 200 + i) for i in range(20)}
    assert len(found & expected) >= 19
    assert len(found - expected) <= 2


def test_distinct_images_stay_apart(images: list[Image.Image]) -> None:
    assert len(register(images)) <= 2


def test_brightness_and_size_do_not_count(images: list[Image.Image]) -> None:
    darker = images[0].point(lambda value: value // 2)
    larger = images[1].resize((90, 70), Image.Resampling.BICUBIC)
    edges = register([*images, darker, larger])
    found = set(zip(edges.first.tolist(), edges.second.tolist(), strict=True))
    assert {(0, 200), (1, 201)} <= found


def test_proposed_pairs_are_judged_not_believed(images: list[Image.Image]) -> None:
    believed = make_edges(np.array([0]), np.array([1]), np.ones(1, dtype=np.float32))
    assert len(register(images, believed)) == len(register(images))


def test_flat_and_few_images_have_no_copies() -> None:
    flat: NDArray[np.uint8] = np.full((3, 32, 32), 9, dtype=np.uint8)
    for thumbnails in (flat, flat[:1], flat[:0]):
        edges = register_copies(
            thumbnails, proposals=NO_PAIRS, candidate_threshold=0.85, edge_threshold=0.97
        )
        assert len(edges) == 0
