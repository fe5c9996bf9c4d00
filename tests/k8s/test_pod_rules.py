from __future__ import annotations

from typing import Any

import pytest

from k8s.pod_rules import (
    containers_of,
    environment_problems,
    image_problems,
    pod_problems,
    pods_of,
)
from tests.k8s.shipped import DIGEST, changed

POD: dict[str, Any] = {
    "automountServiceAccountToken": False,
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "node",
            "image": f"registry.example.com/dinopipe@{DIGEST}",
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
            "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
    ],
    "volumes": [{"name": "scratch", "emptyDir": {}}],
}
SECURITY = "containers.0.securityContext"


def test_a_closed_pod_is_left_alone() -> None:
    assert list(pod_problems(POD)) == []
    assert list(image_problems(POD)) == []
    assert list(environment_problems(POD)) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("hostNetwork", True, "hostNetwork is set"),
        ("automountServiceAccountToken", ..., "automountServiceAccountToken"),
        ("securityContext", ..., "runAsNonRoot"),
        ("securityContext.seccompProfile.type", "Unconfined", "seccompProfile"),
        ("volumes.0.hostPath", {"path": "/"}, "volume scratch is a directory of the node"),
        (f"{SECURITY}.privileged", True, "privileged"),
        (f"{SECURITY}.allowPrivilegeEscalation", ..., "allowPrivilegeEscalation"),
        (f"{SECURITY}.readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
        (f"{SECURITY}.runAsUser", 0, "run as root"),
        (f"{SECURITY}.capabilities.drop", ["NET_RAW"], "drop lacks ALL"),
        (f"{SECURITY}.capabilities.add", ["IPC_LOCK"], "IPC_LOCK"),
        ("containers.0.ports", [{"hostPort": 80}], "hostPort"),
        ("containers.0.resources", ..., "requests lacks cpu and memory"),
        ("containers.0.resources.limits", ..., "limits lacks memory"),
    ],
)
def test_an_open_pod_is_refused(path: str, value: Any, said: str) -> None:
    assert any(said in problem for problem in pod_problems(changed(POD, path, value)))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("dinopipe", "has no digest"),
        ("registry.example.com/dinopipe:1.0", "has no digest"),
        ("registry.example.com/dinopipe@sha256:abc", "has no digest"),
        (f"registry.invalid/dinopipe@{DIGEST}", "placeholder"),
        ("registry.example.com/dinopipe@sha256:" + "0" * 64, "placeholder"),
    ],
)
def test_an_image_is_named_by_its_content(image: str, said: str) -> None:
    (problem,) = image_problems(changed(POD, "containers.0.image", image))
    assert said in problem
    assert image in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "something"),
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("DATABASE", "postgresql://mlflow:hunter2@db/mlflow"),
        ("KEY", "-----BEGIN PRIVATE KEY-----"),
    ],
)
def test_a_secret_by_value_is_refused_and_not_repeated(name: str, value: str) -> None:
    (problem,) = environment_problems(
        changed(POD, "containers.0.env", [{"name": name, "value": value}])
    )
    assert f"has a value for {name};" in problem
    assert value not in problem.replace(name, "")


def test_a_secret_by_reference_is_right() -> None:
    reference = {"secretKeyRef": {"name": "dinopipe-s3", "key": "AWS_SECRET_ACCESS_KEY"}}
    variable = {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": reference}
    assert list(environment_problems(changed(POD, "containers.0.env", [variable]))) == []


def test_variables_of_trainer_are_refused_in_a_trainjob_too() -> None:
    trainjob = {"spec": {"trainer": {"env": [{"name": "PET_NNODES", "value": "2"}]}}}
    (problem,) = environment_problems(trainjob)
    assert problem.startswith("spec.trainer.env sets PET_NNODES")


def test_pods_are_found_wherever_they_are_but_not_in_patches() -> None:
    manifest = {"spec": {"template": {"spec": POD}, "runtimePatches": [{"spec": POD}]}}
    assert [path for path, _ in pods_of(manifest)] == ["spec.template.spec"]


def test_first_containers_are_looked_at_too() -> None:
    pod = {**POD, "initContainers": [{"name": "first"}]}
    assert [path for path, _ in containers_of(pod)] == ["initContainers[0]", "containers[0]"]
    assert any("initContainers[0] first" in problem for problem in pod_problems(pod))
