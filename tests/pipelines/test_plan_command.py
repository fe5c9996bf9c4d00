from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.__main__ import main
from tests.pipelines.specs import small_values, write_spec


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml")


def test_a_plan_is_shown_and_written_and_compared(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", str(spec), "--hardware", "h100", "--no-scaling", "-o", str(tmp_path / "plan")]
    assert main(plan) == 0
    first = capsys.readouterr().out
    assert "plan on h100" in first
    assert "pipeline.yaml is new" in first
    assert main(plan) == 0
    assert "nothing would change" in capsys.readouterr().out


def test_json_is_all_that_is_printed(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(spec), "--hardware", "cpu", "--no-scaling", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == {"pretrain", "finetune"}


def test_wrong_flags_are_refused(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(spec), "--hardware", "abacus"]) == 2
    assert "neither a profile nor a file" in capsys.readouterr().err
    assert main(["plan", str(spec), "--no-scaling", "--against", "nowhere"]) == 2
    assert "is no directory" in capsys.readouterr().err
    assert main(["plan", str(spec), "--price-per-gpu-hour", "-1"]) == 2
