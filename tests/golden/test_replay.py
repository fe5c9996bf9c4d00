"""The reference's own numbers, step by step."""

import json
from pathlib import Path

import pytest
import torch

from dinov2_core.training.schedules import schedule_at
from tests.golden.replay import main, schedule_error, training_config

RECORDINGS = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCES = {
    "losses": 2e-6,
    "grad_norms": 5e-6,
    "grads": 2e-5,
    "final_elements": 3e-5,
    "final_update": 1e-4,
}


@pytest.fixture(params=["centering_shared", "sinkhorn_separate"])
def recording(request: pytest.FixtureRequest) -> Path:
    path = RECORDINGS / f"{request.param}.pt"
    if not path.exists():
        pytest.skip(f"no recording at {path}; the reference's numbers are not part of the package")
    return path


def test_replay_reproduces_the_reference(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recording)]) == 0
    errors = json.loads(capsys.readouterr().out)
    assert errors.keys() == TOLERANCES.keys()
    for quantity, tolerance in TOLERANCES.items():
        assert errors[quantity] <= tolerance, quantity


def test_schedules_are_the_recorded_ones(recording: Path) -> None:
    content = torch.load(recording, weights_only=True)
    config = training_config(content)
    for step, recorded in enumerate(content["steps"]):
        error = schedule_error(recorded["schedule"], schedule_at(step, config=config))
        assert error <= 1e-12, step
