from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet
import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """Real images: PNG files of product photographs."""
    table = parquet.read_table(REPOSITORY / "pipelines/demo/fashion_mnist_test.parquet")
    images: list[bytes] = table["image"].slice(0, 80).to_pylist()
    return images
