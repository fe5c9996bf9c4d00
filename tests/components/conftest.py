from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from tests.s3_server import s3_server

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that stay away are given up after a second, in processes that tests start too."""
    monkeypatch.setenv("DINOPIPE_RETRY_SECONDS", "1")


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """Real images: PNG files of product photographs."""
    table = parquet.read_table(REPOSITORY / "pipelines/demo/fashion_mnist_test.parquet")
    images: list[bytes] = table["image"].slice(0, 80).to_pylist()
    return images


@pytest.fixture(scope="session")
def shared_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow store for all tests that do not mind others: making a new one takes seconds."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An S3 server on loopback with the bucket `pile`, and a cache; gives its address."""
    with s3_server(monkeypatch, cache_directory=tmp_path / "cache") as endpoint:
        yield endpoint
