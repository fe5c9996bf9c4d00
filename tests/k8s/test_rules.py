from __future__ import annotations

import io
from typing import Any

import pytest

from k8s.rules import main, problems
from tests.k8s.shipped import DIGEST, Manifest, changed

TEMPLATE = "spec.template.spec.replicatedJobs.0.template"


@pytest.fixture
def shipped(installed: dict[str, list[Manifest]]) -> list[Manifest]:
    return [*installed["prod-gpu"], *installed["smoke"]]


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "message"),
    [
        ("TrainJob", "dinopipe-smoke", "spec.trainer.image", "dinopipe:latest", "has no digest"),
        # secrets
        ("ConfigMap", None, "data.uri", "s3://key:value@bucket", "data.uri looks like a secret"),
        ("ConfigMap", None, "kind", "Secret", "is a Secret"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.env", [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}], "has a value for AWS_SECRET_ACCESS_KEY"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.env", [{"name": "DATABASE", "value": "postgresql://mlflow:hunter2@db/mlflow"}], "has a value for DATABASE"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.env", [{"name": "KEY", "value": "-----BEGIN PRIVATE KEY-----"}], "has a value for KEY"),
        # images
        ("TrainJob", "dinopipe-smoke", "spec.trainer.image", "dinopipe", "has no digest"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.image", "registry.example.com/dinopipe@sha256:abc", "has no digest"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.image", f"registry.invalid/dinopipe@{DIGEST}", "placeholder"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.image", "registry.example.com/dinopipe@sha256:" + "0" * 64, "placeholder"),
        # what Trainer does without silently
        ("TrainingRuntime", "dinopipe-fsdp-v1", "metadata.labels", {}, "lacks the label trainer.kubeflow.org/framework"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.metadata.labels", {}, "no replicated job has the label"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.template.spec.containers.0.name", "main", "no container is named node"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.podFailurePolicy", ..., "podFailurePolicy has no rule"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", "spec.template.spec.failurePolicy.rules", ..., "failurePolicy has no rule"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.template.spec.restartPolicy", "OnFailure", "restartPolicy is not Never"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.numNodes", ..., "numNodes is missing"),
        # references
        ("LocalQueue", "dinopipe", "spec.clusterQueue", "all", "refers to ClusterQueue all"),
        ("ClusterQueue", "dinopipe", "spec.resourceGroups.0.flavors.0.name", "h100", "refers to ResourceFlavor h100"),
        ("TrainJob", "dinopipe-smoke", "spec.runtimeRef.name", "dinopipe-fsdp-v0", "refers to TrainingRuntime dinopipe-fsdp-v0"),
        ("TrainJob", "dinopipe-smoke", "metadata.labels", {"kueue.x-k8s.io/queue-name": "slow"}, "refers to LocalQueue slow"),
        ("TrainJob", "dinopipe-smoke", "metadata.labels", {"kueue.x-k8s.io/priority-class": "vip"}, "refers to WorkloadPriorityClass vip"),
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused(
    kind: str, name: str | None, path: str, value: Any, message: str, shipped: list[Manifest]
) -> None:
    assert problems(shipped) == []
    broken = [
        changed(item, path, value)
        if item["kind"] == kind and name in (None, item["metadata"]["name"])
        else item
        for item in shipped
    ]
    assert broken != shipped
    assert any(message in problem for problem in problems(broken)), problems(broken)


def test_problems_name_the_object_first_and_no_secret(shipped: list[Manifest]) -> None:
    variable = {"name": "DATABASE", "value": "postgresql://mlflow:hunter2@db/mlflow"}
    broken = [
        changed(item, "spec.trainer.env", [variable]) if item["kind"] == "TrainJob" else item
        for item in shipped
    ]
    (problem,) = problems(broken)
    assert problem.startswith("TrainJob dinopipe-smoke: ")
    assert "hunter2" not in problem


def test_a_secret_by_reference_is_right(shipped: list[Manifest]) -> None:
    reference = {"secretKeyRef": {"name": "dinopipe-s3", "key": "AWS_SECRET_ACCESS_KEY"}}
    variable = {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": reference}
    changed_job = [
        changed(item, "spec.trainer.env", [variable]) if item["kind"] == "TrainJob" else item
        for item in shipped
    ]
    assert problems(changed_job) == []


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("", 2, "no manifests on standard input"),
        ("a: [", 2, "standard input is not YAML"),
        ("kind: TrainJob\nmetadata: {name: x}\nspec: 3\n", 2, "not of the shape of its kind"),
        ("- a list\n", 2, "not of the shape of its kind"),
        ("kind: Namespace\napiVersion: v1\nmetadata: {name: x}\n", 0, ""),
    ],
)
def test_the_program_reports_what_is_wrong_without_a_traceback(
    text: str,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main() == code
    report = capsys.readouterr().err
    assert message in report
    assert "Traceback" not in report
