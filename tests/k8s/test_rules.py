from __future__ import annotations

import io
from typing import Any

import pytest

from k8s.rules import main, problems
from tests.k8s.shipped import Manifest, changed

TEMPLATE = "spec.template.spec.replicatedJobs.0.template"


@pytest.fixture
def shipped(installed: dict[str, list[Manifest]]) -> list[Manifest]:
    return [*installed["prod-gpu"], *installed["smoke"]]


@pytest.mark.parametrize(
    ("kind", "name", "path", "value", "said"),
    [
        # pods
        ("Deployment", "mlflow", "spec.template.spec.hostPID", True, "hostPID is set"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.template.spec.securityContext", ..., "runAsNonRoot"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.image", "dinopipe:latest", "has no digest"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.env", [{"name": "PET_NNODES", "value": "2"}], "PET_NNODES"),
        # secrets
        ("ConfigMap", None, "data.uri", "s3://key:value@bucket", "data.uri looks like a secret"),
        ("ConfigMap", None, "kind", "Secret", "is a Secret"),
        # rights
        ("Role", "dinopipe-launcher", "rules.0.verbs", ["*"], "verbs has *"),
        ("Role", "dinopipe-launcher", "rules.0.apiGroups", ["*"], "apiGroups has *"),
        ("Role", "dinopipe-submitter", "rules.0.verbs", ["get", "escalate"], "verbs has escalate"),
        ("Role", "dinopipe-pipeline-pods", "rules.2.resourceNames", ..., "every Secret"),
        # what Trainer does without silently
        ("TrainingRuntime", "dinopipe-fsdp-v1", "metadata.labels", {}, "lacks the label trainer.kubeflow.org/framework"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.metadata.labels", {}, "no replicated job has the label"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.template.spec.containers.0.name", "main", "no container is called node"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.podFailurePolicy", ..., "podFailurePolicy has no rule"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", "spec.template.spec.failurePolicy.rules", ..., "failurePolicy has no rule"),
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.template.spec.restartPolicy", "OnFailure", "restartPolicy is not Never"),
        ("TrainJob", "dinopipe-smoke", "spec.trainer.numNodes", ..., "numNodes is missing"),
        # names and namespaces
        ("Role", "dinopipe-submitter", "metadata.name", "dinopipe-launcher", "Role dinopipe-launcher: is there 2 times"),
        ("ClusterQueue", "dinopipe", "metadata.namespace", "dinopipe", "has a namespace"),
        ("LimitRange", "dinopipe", "metadata.namespace", ..., "has no namespace"),
        ("Service", "mlflow", "metadata.namespace", "other", "several namespaces: dinopipe, other"),
        # selectors
        ("Service", "mlflow", "spec.selector", {"app": "mlflow"}, "chooses no pod"),
        ("Deployment", "mlflow", "spec.selector.matchLabels", {"app": "mlflow"}, "chooses no pod"),
        ("PodDisruptionBudget", "mlflow", "spec.selector.matchLabels", {"app": "x"}, "chooses no pod"),
        # references
        ("TrainingRuntime", "dinopipe-fsdp-v1", f"{TEMPLATE}.spec.template.spec.serviceAccountName", "nobody", "names ServiceAccount nobody"),
        ("Deployment", "mlflow", "spec.template.spec.containers.0.env.1.valueFrom.configMapKeyRef.name", "mlflov", "names ConfigMap mlflov"),
        ("Deployment", "mlflow", "spec.template.spec.volumes.0.persistentVolumeClaim", {"claimName": "gone"}, "names PersistentVolumeClaim gone"),
        ("RoleBinding", "dinopipe-launcher", "roleRef.name", "dinopipe", "names Role dinopipe"),
        ("RoleBinding", "dinopipe-launcher", "subjects.0.name", "nobody", "names ServiceAccount nobody"),
        ("LocalQueue", "dinopipe", "spec.clusterQueue", "all", "names ClusterQueue all"),
        ("ClusterQueue", "dinopipe", "spec.resourceGroups.0.flavors.0.name", "h100", "names ResourceFlavor h100"),
        ("TrainJob", "dinopipe-smoke", "spec.runtimeRef.name", "dinopipe-fsdp-v0", "names TrainingRuntime dinopipe-fsdp-v0"),
        ("TrainJob", "dinopipe-smoke", "metadata.labels", {"kueue.x-k8s.io/queue-name": "slow"}, "names LocalQueue slow"),
        ("TrainJob", "dinopipe-smoke", "metadata.labels", {"kueue.x-k8s.io/priority-class": "vip"}, "names WorkloadPriorityClass vip"),
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused(
    kind: str, name: str | None, path: str, value: Any, said: str, shipped: list[Manifest]
) -> None:
    assert problems(shipped) == []
    broken = [
        changed(item, path, value)
        if item["kind"] == kind and name in (None, item["metadata"]["name"])
        else item
        for item in shipped
    ]
    assert broken != shipped
    assert any(said in problem for problem in problems(broken)), problems(broken)


def test_problems_name_the_object_first(shipped: list[Manifest]) -> None:
    role = next(item for item in shipped if item["kind"] == "Role")
    (problem,) = problems([*shipped, role])
    assert problem.startswith(f"Role {role['metadata']['name']}: ")


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", 2, "no manifests on standard input"),
        ("a: [", 2, "standard input is not YAML"),
        ("kind: Role\nmetadata: {name: x}\nrules: 3\n", 2, "not of the shape of its kind"),
        ("kind: Namespace\napiVersion: v1\nmetadata: {name: x}\n", 0, ""),
    ],
)
def test_the_program_tells_what_is_wrong_without_a_traceback(
    text: str,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main() == code
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
