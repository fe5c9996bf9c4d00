"""looking: blocks of fixed files, whose vectors depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.looking import BLOCK_FILES, LOOK_SCHEMA, blocks, look, looks
from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.sources import MemoryImages
from dinov2_core.data.decoding import open_image

Loader = Callable[[str, int], MemoryImages]


class Counting(PixelEmbedder):
    """Counts the images it is asked for."""

    def __init__(self) -> None:
        self.num_images = 0

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        self.num_images += len(images)
        return super().embed(images)


def test_blocks_hold_every_file_once() -> None:
    assert blocks(0) == []
    for count in (1, BLOCK_FILES, BLOCK_FILES + 1, 5 * BLOCK_FILES - 1):
        assert [number for block in blocks(count) for number in block] == list(range(count))
        assert max(len(block) for block in blocks(count)) <= BLOCK_FILES


def test_a_block_tells_everything_about_its_files(demo_images: Loader, tmp_path: Path) -> None:
    png = demo_images("train", 2).contents
    files = MemoryImages(names=tuple("abcde"), contents=(b"", png[0], b"text", png[0], png[1]))
    embedder = Counting()
    made = look(files, range(1, 5), embedder=embedder)
    assert made.schema.equals(LOOK_SCHEMA)
    assert made["name"].to_pylist() == ["b", "c", "d", "e"]
    assert made["refusal"].to_pylist() == [None, "not_an_image", None, None]
    assert made["embedding"].is_valid().to_pylist() == [True, False, False, True]
    assert embedder.num_images == 2, "a picture is embedded once"
    opened = [open_image(content, num_channels=3) for content in png]
    vectors = made["embedding"].drop_null().combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(vectors.reshape(2, -1), PixelEmbedder().embed(opened))
    write_table(made, tmp_path / "block")
    assert pq.read_table(tmp_path / "block").equals(made)


def test_all_files_are_looked_at_in_order() -> None:
    names = [f"{number}" for number in range(BLOCK_FILES + 3)]
    files = MemoryImages(names=names, contents=[b""] * len(names))
    told: list[tuple[str, int, int]] = []
    made = list(
        looks(files, embedder=PixelEmbedder(), progress=lambda *report: told.append(report))
    )
    assert [name for block in made for name in block["name"].to_pylist()] == names
    assert told == [("scan", BLOCK_FILES, len(names)), ("scan", len(names), len(names))]
