"""Each validator is fed something broken and refuses it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.schemas import schema_problems
from tests.k8s.shipped import Manifest, changed

POD = "spec.template.spec.replicatedJobs.0.template.spec.template.spec"
FAILURE = "spec.template.spec.failurePolicy"
NODE = f"{POD}.containers.0"

BROKEN = [
    # built-in kinds: unknown field, wrong type, enumeration, missing field
    ("Deployment", "spec.replica", 2, "replica"),
    ("Deployment", "spec.replicas", "2", "'2' is not of type"),
    ("Deployment", "spec.template.spec.containers.0.securityContext.privilege", True, "privilege"),
    ("Deployment", "spec.selector", ..., "'selector' is a required property"),
    ("NetworkPolicy", "spec.ingres", [], "ingres"),
    ("ResourceQuota", "spec.hard.pods", True, "True is not"),
    ("ServiceAccount", "automountServiceAccountToken", "no", "'no' is not of type"),
    # Kubeflow Trainer and JobSet: by the official models
    ("TrainingRuntime", "spec.mlPolicy.numNodez", 2, "spec.mlPolicy.numNodez: unknown field"),
    ("TrainingRuntime", "spec.mlPolicy.numNodes", "2", "valid integer"),
    ("TrainingRuntime", "spec.template.spec.failurePolicy.maxRestart", 1, "unknown field"),
    ("TrainingRuntime", "spec.template.spec.network.enableDNSHostname", True, "unknown field"),
    ("TrainJob", "spec.podSpecOverrides", [], "spec.podSpecOverrides: unknown field"),
    ("TrainJob", "spec.trainer.numNodes", "2", "valid integer"),
    ("TrainJob", "spec.runtimeRef.name", ..., "name"),
    ("TrainingRuntime", f"{FAILURE}.restartStrategy", "Never", "restartStrategy Never: not one"),
    ("TrainingRuntime", f"{FAILURE}.rules.0.action", "Fail", "action Fail: not one of"),
    ("TrainingRuntime", f"{FAILURE}.rules.0.onJobFailureReasons", ["Exit"], "reason Exit: not"),
    ("TrainingRuntime", f"{FAILURE}.rules.0.name", "wrong-input", "rule wrong-input"),
    # the pods in a TrainingRuntime: by Kubernetes' own schema
    ("TrainingRuntime", f"{NODE}.imagePullPolice", "Always", "unknown field"),
    ("TrainingRuntime", f"{NODE}.resources.requests.cpu", [2], "valid string"),
    ("TrainingRuntime", f"{POD}.restartPolicy", 0, "valid string"),
    ("TrainingRuntime", f"{POD}.containers", ..., "containers"),
    # Kueue and External Secrets: by what their CRDs say
    ("ClusterQueue", "spec.queueingStrategy", "Fifo", "StrictFIFO"),
    ("ClusterQueue", "spec.resourceGroups.0.coveredResources", ["cpu"], "in this order"),
    ("ClusterQueue", "spec.resourceGroups.0.flavors.0.resources.0.nominalQuota", "8 CPU", "match"),
    ("ClusterQueue", "spec.cohort", "all", "Extra inputs"),
    ("ClusterQueue", "metadata.namespace", "dinopipe", "Extra inputs"),
    ("LocalQueue", "apiVersion", "kueue.x-k8s.io/v1alpha1", "v1beta2"),
    ("ResourceFlavor", "spec", {"topologyName": "racks"}, "at least one nodeLabel"),
    ("WorkloadPriorityClass", "value", "100", "valid integer"),
]


@pytest.mark.parametrize(("kind", "path", "value", "message"), BROKEN)
def test_a_broken_manifest_is_refused(
    kind: str, path: str, value: Any, message: str, installed: dict[str, list[Manifest]]
) -> None:
    every = [item for overlay in ("prod-gpu", "smoke") for item in installed[overlay]]
    manifest = next(item for item in every if item["kind"] == kind)
    assert schema_problems(manifest) == []
    found = schema_problems(changed(manifest, path, value))
    assert any(message in text for text in found), found
