"""A training as a PyTorchJob, for clusters that still run Kubeflow's training operator v1."""

from __future__ import annotations

from typing import Any

from k8s.job_kind import JobKind
from k8s.training import (
    USER,
    Training,
    environment_of,
    metadata_of,
    mounts_of,
    pod_metadata_of,
    pod_spec_of,
    resources_of,
    stamped,
)

PYTORCH_JOBS = JobKind(group="kubeflow.org", version="v1", plural="pytorchjobs")
CONTAINER = "pytorch"
"""Name that the operator demands of the container."""
GRACE_SECONDS = 300
"""How long a stopped pod may take to write its checkpoint."""


def pytorchjob(training: Training, *, max_restarts: int) -> dict[str, Any]:
    """The manifest of a PyTorchJob without elasticity.

    The operator has no runtime to take a pod from, so the whole pod stands here, fit for a
    namespace with the restricted Pod Security Standard. The init container that the operator adds
    to workers is not: for more than one node it has to be started with
    --pytorch-init-container-template-file and a template that drops all rights.

    Args:
        training: What is asked for.
        max_restarts: Restarts of containers before the job fails; the others of the training
            end with the one that failed, so all of them start again together.
    """
    return stamped(training, render=lambda training: _manifest(training, max_restarts=max_restarts))


def _manifest(training: Training, *, max_restarts: int) -> dict[str, Any]:
    replicas: dict[str, Any] = {"Master": _replicas(training, count=1)}
    if training.num_nodes > 1:
        replicas["Worker"] = _replicas(training, count=training.num_nodes - 1)
    return {
        "apiVersion": PYTORCH_JOBS.api_version,
        "kind": "PyTorchJob",
        "metadata": metadata_of(training),
        "spec": {
            "nprocPerNode": str(training.processes_per_node),
            "runPolicy": {
                "activeDeadlineSeconds": training.pods.deadline_seconds,
                "backoffLimit": max_restarts,
                "cleanPodPolicy": "Running",
            },
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replicas(training: Training, *, count: int) -> dict[str, Any]:
    container = {
        "name": CONTAINER,
        "image": training.pods.image,
        "command": list(training.command),
        "env": environment_of(training),
        "resources": resources_of(training.pods),
        "volumeMounts": [*mounts_of(training.pods), {"name": "scratch", "mountPath": "/tmp"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    pod = pod_spec_of(training)
    spec = pod | {
        "containers": [container],
        "volumes": [*pod.get("volumes", ()), {"name": "scratch", "emptyDir": {}}],
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    template = {"metadata": pod_metadata_of(training), "spec": spec}
    return {"replicas": count, "restartPolicy": "OnFailure", "template": template}
