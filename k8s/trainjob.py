"""A training as a TrainJob of Kubeflow Trainer v2."""

from __future__ import annotations

from typing import Any

from k8s.job_kind import JobKind
from k8s.training import (
    Training,
    environment_of,
    metadata_of,
    mounts_of,
    pod_metadata_of,
    pod_spec_of,
    resources_of,
    stamped,
)

TRAIN_JOBS = JobKind(group="trainer.kubeflow.org", version="v1alpha1", plural="trainjobs")
CONTAINER = "node"
"""Name that Trainer demands of the container; the replicated job of our runtime has it too."""
MANAGER = "dinopipe/launcher"
"""Whose patches of the runtime these are; Kueue adds its own."""


def trainjob(training: Training, *, runtime: str) -> dict[str, Any]:
    """The manifest of a TrainJob.

    `suspend` is left to Kueue. Variables stand in `trainer`, the only place where Trainer takes
    them, and the number of nodes as well: without it there would be no PET_* at all.

    Args:
        training: What is asked for.
        runtime: TrainingRuntime in the training's namespace.
    """
    return stamped(training, render=lambda training: _manifest(training, runtime=runtime))


def _manifest(training: Training, *, runtime: str) -> dict[str, Any]:
    pods = training.pods
    container = {"name": CONTAINER, "volumeMounts": mounts_of(pods)}
    spec = pod_spec_of(training)
    if container["volumeMounts"]:
        spec["containers"] = [container]
    pod = {"metadata": pod_metadata_of(training), "spec": spec}
    replicated = {"name": CONTAINER, "template": {"spec": {"template": pod}}}
    return {
        "apiVersion": TRAIN_JOBS.api_version,
        "kind": "TrainJob",
        "metadata": metadata_of(training),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": runtime,
            },
            "activeDeadlineSeconds": pods.deadline_seconds,
            "trainer": {
                "image": pods.image,
                "command": list(training.command),
                "numNodes": training.num_nodes,
                "numProcPerNode": training.processes_per_node,
                "env": environment_of(training),
                "resourcesPerNode": resources_of(pods),
            },
            "runtimePatches": [
                {
                    "manager": MANAGER,
                    "trainingRuntimeSpec": {
                        "template": {"spec": {"replicatedJobs": [replicated]}},
                    },
                }
            ],
        },
    }
