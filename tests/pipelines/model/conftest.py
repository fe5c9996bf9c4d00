from __future__ import annotations

import pytest

from tests.components.runtime.test_registry import registered


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking store with one registered teacher, `models:/registry-test@champion`."""
    folder = tmp_path_factory.mktemp("store")
    images = [b"0", b"1", b"2", b"3"]
    registered(folder, folder / "first", images, seed=0, value=0.5)
    return f"sqlite:///{folder / 'mlflow.db'}"
