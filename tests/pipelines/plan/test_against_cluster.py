"""plan_cluster: a spec and manifests beside an API server on loopback."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.launchers import RUNTIME
from pipelines.cluster.submit import target_of
from pipelines.plan.against_cluster import (
    BASE_RUNTIME,
    Comparison,
    cluster_report,
    compare_or_say_why,
    compared_with_cluster,
)
from pipelines.plan.jobs import RanksPhase, planned_job
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.k8s.api_server import ApiServer, api_server
from tests.k8s.shipped import Manifest, applied, changed
from tests.pipelines.specs import small_values, write_spec

IMAGE = f"registry.example/dinopipe@sha256:{'a' * 64}"
RUN = "0b1f7f0e-6a3c-4f3e-9f5e-7a1c2d3e4f50"
CONFIG: Manifest = {
    "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mlflow", "namespace": "team"},
    "data": {"bucket": "s3://ours"},
}  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


def a_spec(folder: Path, *, kind: str = "trainjob", **changes: Any) -> PipelineSpec:
    placement = {"launcher": {"kind": kind}, "namespace": "team"}
    values = small_values(
        "s3://bucket/pile",
        placement=placement,
        tracking={"uri": "https://mlflow.example"},
        **changes,
    )
    return load_spec(write_spec({**values, "image": IMAGE}, folder / "spec.yaml"))


def start(server: ApiServer, spec: PipelineSpec, phase: RanksPhase, *, run: str = RUN) -> Manifest:
    """Put the job of a run on the server, as its step and the controllers leave it."""
    planned = planned_job(phase, spec, target_of(spec), run=run, work="0123456789abcdef")
    assert planned is not None
    kind, job = copy.deepcopy(planned)
    variables = {"name": "MLFLOW_RUN_ID", "value": "c0ffee"}, {"name": "AWS_REGION", "value": "x"}
    if kind.plural == "trainjobs":
        job["spec"]["trainer"]["env"] += variables
    else:
        (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"][
            "containers"
        ]
        container["env"] += variables
    made = server.cluster().create(kind, job)
    made["metadata"] |= {"uid": "1", "creationTimestamp": f"2026-01-0{1 + len(server.jobs)}"}
    made["spec"]["suspend"] = False
    made["status"] = {"conditions": []}
    server.jobs[made["metadata"]["name"]] = made
    return made


def compared(
    spec: PipelineSpec, server: ApiServer, manifests: list[Manifest] | None = None
) -> dict[str, Comparison]:
    """Comparisons by kind and name, in short."""
    found = compared_with_cluster(
        spec, target_of(spec), manifests=manifests or [], cluster=server.cluster()
    )
    return {item.name: item for item in found}


@pytest.mark.parametrize("kind", ["trainjob", "pytorchjob"])
def test_the_job_of_an_earlier_run_is_as_planned(
    cluster: ApiServer, tmp_path: Path, kind: str
) -> None:
    spec = a_spec(tmp_path, kind=kind)
    job = start(cluster, spec, "pretrain")
    found = compared(spec, cluster)
    mine = found[f"{job['kind']} team/{job['metadata']['name']}"]
    assert (mine.verdict, mine.lines) == ("as planned", ())
    (other,) = (item for name, item in found.items() if "finetune" in name)
    assert other.verdict == "not deployed"


def test_a_changed_setting_is_a_line_beside_the_newest_job_of_this_name(
    cluster: ApiServer, tmp_path: Path
) -> None:
    spec = a_spec(tmp_path)
    start(cluster, spec, "pretrain", run="aaaaaaaa-older")
    newest = start(cluster, spec, "pretrain")
    start(cluster, spec.model_copy(update={"name": "other"}), "pretrain", run="bbbbbbbb-other")
    start(cluster, spec, "finetune", run="cccccccc-stage")
    wider = a_spec(tmp_path, resources={"pretrain": {"cpu": "7", "memory": "64Gi"}})
    item = compared(wider, cluster)[f"TrainJob team/{newest['metadata']['name']}"]
    assert item.verdict == "different"
    signs = [line.replace(" ", "") for line in item.lines[2:] if line[0] in "+-"]
    assert sorted(signs) == sorted(
        ["-cpu:'2'", "+cpu:'7'", "-memory:8Gi", "+memory:64Gi", "-memory:8Gi", "+memory:64Gi"]
    )


def test_our_runtime_is_compared_without_its_image_and_its_overlay(
    cluster: ApiServer, tmp_path: Path
) -> None:
    spec = a_spec(tmp_path)
    name = f"TrainingRuntime team/{RUNTIME}"
    assert compared(spec, cluster)[name].verdict == "not deployed"
    runtime: Manifest = yaml.safe_load(BASE_RUNTIME.read_text())
    runtime["metadata"]["namespace"] = "team"
    runtime["metadata"]["labels"]["app.kubernetes.io/part-of"] = "dinopipe"
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    job["template"]["spec"]["template"]["spec"]["containers"][0]["image"] = IMAGE
    cluster.objects.append(applied(runtime))
    assert compared(spec, cluster)[name].verdict == "as planned"
    restarts = "spec.template.spec.failurePolicy.maxRestarts"
    cluster.objects[0] = changed(cluster.objects[0], restarts, 3)
    found = compared(spec, cluster)[name]
    signs = [line.replace(" ", "") for line in found.lines if "Restarts" in line]
    assert signs == ["-maxRestarts:3", "+maxRestarts:10"]
    ours = applied(runtime)
    assert compared(spec, cluster, [runtime])[name].verdict == "different"
    cluster.objects[0] = ours
    assert compared(spec, cluster, [runtime])[name].verdict == "as planned"


def test_a_runtime_of_somebody_elses_is_only_looked_for(cluster: ApiServer, tmp_path: Path) -> None:
    spec = a_spec(tmp_path, placement__launcher__runtime="theirs")
    assert compared(spec, cluster)["TrainingRuntime team/theirs"].verdict == "not deployed"
    theirs = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainingRuntime"}
    cluster.objects.append(theirs | {"metadata": {"name": "theirs", "namespace": "team"}})
    assert compared(spec, cluster)["TrainingRuntime team/theirs"].verdict == "as planned"


def test_one_missing_right_does_not_hide_the_rest(cluster: ApiServer, tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "team"}}
    cluster.objects += [applied(CONFIG)]
    cluster.forbidden |= {"secrets", "trainjobs"}
    found = compared(spec, cluster, [secret, CONFIG])
    assert found["Secret team/s"].verdict == "cannot tell"
    assert found["ConfigMap team/mlflow"].verdict == "as planned"
    jobs = [item.verdict for name, item in found.items() if name.startswith("TrainJob")]
    assert jobs == ["cannot tell", "cannot tell"]
    report = cluster_report(list(found.values()), namespace="team")
    assert (
        "Secret team/s: cannot tell: forbidden to get /api/v1/namespaces/team/secrets/s" in report
    )


def test_the_report_counts_and_tells() -> None:
    report = cluster_report(
        [
            Comparison.of(CONFIG, applied(CONFIG)),
            Comparison.of(CONFIG, changed(applied(CONFIG), "data.bucket", "s3://old")),
            Comparison.of(CONFIG, None),
        ],
        namespace="team",
    )
    first, *rest = report.splitlines()
    assert first == (
        "objects on the cluster (namespace team): 1 as planned, 1 different, 1 not deployed"
    )
    assert rest[:2] == [
        "ConfigMap team/mlflow is not deployed",
        "ConfigMap team/mlflow is different",
    ]
    assert {"-  bucket: s3://old", "+  bucket: s3://ours"} <= set(rest)


def test_without_a_cluster_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "no")
    )
    spec = a_spec(tmp_path)
    told = compare_or_say_why(spec, target_of(spec), manifests=[])
    assert told.startswith("objects on the cluster (namespace team): cannot tell: no cluster to")
