"""Demo images that several curation tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.dinov2_core.curation.image_files import MemoryImages

_DEMO = Path(__file__).parents[3] / "pipelines" / "demo"


@pytest.fixture(scope="session")
def demo_images() -> Callable[[str, int], MemoryImages]:
    """The first images of Fashion-MNIST's training or test part."""

    def load(part: str, number: int) -> MemoryImages:
        table = pq.read_table(_DEMO / f"fashion_mnist_{part}.parquet", columns=["image"])
        contents = table["image"].slice(0, number).to_pylist()
        names = [f"{part}-{i}" for i in range(number)]
        return MemoryImages(names=names, contents=contents)

    return load
