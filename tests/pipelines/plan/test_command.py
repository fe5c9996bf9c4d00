from __future__ import annotations

import json
from pathlib import Path

import kfp
import pytest

from pipelines.__main__ import main
from pipelines.cluster.submit import publish, target_of
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.kfp_server import KfpServer
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


def test_the_pipeline_and_the_objects_are_compared_with_the_cluster(
    server: KfpServer,
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = kfp.Client(host=server.url, namespace="dinopipe")
    publish(client, load_spec(spec), target_of(load_spec(spec)))
    plan = ["plan", str(spec), "--no-scaling", "--hardware", "cpu", "--host", server.url]
    plan += ["--namespace", "dinopipe", "--against", "cluster"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(plan) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "pipeline.yaml is as deployed"
    assert main([*plan, "--overlay", "prod-gpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "pipeline.yaml is as deployed"
    assert last[1].startswith("objects of prod-gpu: kubectl is not installed here; run: kubectl")


def test_wrong_flags_are_refused(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(spec), "--hardware", "abacus"]) == 2
    assert "neither a profile nor a file" in capsys.readouterr().err
    assert main(["plan", str(spec), "--no-scaling", "--against", "nowhere"]) == 2
    assert "is no directory" in capsys.readouterr().err
    assert main(["plan", str(spec), "--price-per-gpu-hour", "-1"]) == 2
