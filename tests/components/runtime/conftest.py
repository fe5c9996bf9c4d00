from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.context import RunContext
from components.runtime.tracking import Tracker


@pytest.fixture
def context(shared_workdir: Path, request: pytest.FixtureRequest) -> RunContext:
    return RunContext(
        workdir=str(shared_workdir), run_id=f"run-{request.node.name}"[:80], run_name="test"
    )


@pytest.fixture
def tracker(context: RunContext) -> Tracker:
    return Tracker(context)
