"""A training as a TrainJob of Kubeflow Trainer v2."""

from __future__ import annotations

from typing import Any

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

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
"""Of the API that serves TrainJobs."""
CONTAINER = "node"
"""Name that Trainer demands of the container; the replicated job of our runtime has it too."""
MANAGER = "dinopipe/launcher"
"""Manager of our patches of the runtime; Kueue adds its own."""


def trainjob(training: Training, *, runtime: str) -> dict[str, Any]:
    """The manifest of a TrainJob.

    `suspend` is left to Kueue. Trainer reads variables and the number of nodes only in `trainer`:
    without them there would be no PET_* at all.

    Args:
        training: Command, ranks, environment and pods.
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
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": metadata_of(training),
        "spec": {
            "runtimeRef": {
                "apiGroup": GROUP,
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
