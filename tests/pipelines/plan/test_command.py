from __future__ import annotations

import json
from pathlib import Path

import kfp
import pytest

from pipelines.__main__ import main
from pipelines.cluster.submit import publish, target_of
from pipelines.plan.render import built_manifests
from pipelines.spec.pipeline_spec import load_spec
from tests.k8s.api_server import api_server
from tests.k8s.shipped import applied
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


def test_all_that_is_deployed_is_compared(
    server: KfpServer,
    kubectl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kubeflow has the pipeline and the API server every object of the overlay but one."""
    values = small_values(
        "s3://bucket/pile",
        placement={"launcher": {"kind": "trainjob"}},
        tracking={"uri": "https://mlflow.example"},
        image=f"registry.example/dinopipe@sha256:{'a' * 64}",
    )
    spec = write_spec(values, tmp_path / "spec.yaml")
    publish(
        kfp.Client(host=server.url, namespace="dinopipe"),
        load_spec(spec),
        target_of(load_spec(spec)),
    )
    plan = ["plan", str(spec), "--no-scaling", "--hardware", "cpu", "--host", server.url]
    plan += ["--namespace", "dinopipe", "--against", "cluster", "--overlay", "prod-gpu"]
    manifests = [applied(item) for item in built_manifests("prod-gpu")]
    with api_server() as objects:
        file = objects.write_kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        objects.objects += manifests[1:]
        assert main(plan) == 0
    told = capsys.readouterr().out
    assert "pipeline.yaml is as deployed" in told
    counts = f"{len(manifests) - 1} as planned"
    assert f"namespace dinopipe): 3 not deployed, {counts}" in told
    assert f"{manifests[0]['kind']} {manifests[0]['metadata']['name']} is not deployed" in told


def test_wrong_flags_are_refused(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(spec), "--hardware", "abacus"]) == 2
    assert "neither a profile nor a file" in capsys.readouterr().err
    assert main(["plan", str(spec), "--no-scaling", "--against", "nowhere"]) == 2
    assert "is no directory" in capsys.readouterr().err
    assert main(["plan", str(spec), "--price-per-gpu-hour", "-1"]) == 2
