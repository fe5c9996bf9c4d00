from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.context import RunContext
from components.runtime.tracking import Tracker


@pytest.fixture(scope="session")
def shared_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests of this folder: making a new one takes seconds."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def context(shared_workdir: Path, request: pytest.FixtureRequest) -> RunContext:
    return RunContext(
        workdir=str(shared_workdir), run_id=f"run-{request.node.name}"[:80], run_name="test"
    )


@pytest.fixture
def tracker(context: RunContext) -> Tracker:
    return Tracker(context)
