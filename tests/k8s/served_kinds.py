"""Kinds that the API server for tests serves: what a cluster with our operators lists of them."""

from __future__ import annotations

import re
from typing import Any

SERVED: dict[str, dict[str, tuple[str, bool]]] = {
    "v1": {
        "ConfigMap": ("configmaps", True),
        "LimitRange": ("limitranges", True),
        "Namespace": ("namespaces", False),
        "PersistentVolumeClaim": ("persistentvolumeclaims", True),
        "ResourceQuota": ("resourcequotas", True),
        "Secret": ("secrets", True),
        "Service": ("services", True),
        "ServiceAccount": ("serviceaccounts", True),
    },
    "apps/v1": {"Deployment": ("deployments", True)},
    "kueue.x-k8s.io/v1beta2": {
        "ClusterQueue": ("clusterqueues", False),
        "LocalQueue": ("localqueues", True),
        "ResourceFlavor": ("resourceflavors", False),
        "WorkloadPriorityClass": ("workloadpriorityclasses", False),
    },
    "networking.k8s.io/v1": {"NetworkPolicy": ("networkpolicies", True)},
    "policy/v1": {"PodDisruptionBudget": ("poddisruptionbudgets", True)},
    "rbac.authorization.k8s.io/v1": {
        "Role": ("roles", True),
        "RoleBinding": ("rolebindings", True),
    },
    "trainer.kubeflow.org/v1alpha1": {
        "TrainJob": ("trainjobs", True),
        "TrainingRuntime": ("trainingruntimes", True),
    },
}
"""By group and version, then kind: plural, and whether it lies in a namespace."""
ADDRESS = re.compile(
    r"/(?:api|apis)/((?:[a-z0-9.-]+/)?v[0-9][a-z0-9]*)"
    r"(?:/(?:namespaces/([^/]+)/)?([a-z]+)(?:/([^/]+))?)?"
)
"""Version, namespace, plural and name."""


def kinds_of(version: str) -> dict[str, Any]:
    """What discovery answers, subresources included."""
    resources = [
        {"name": f"{plural}{part}", "kind": kind, "namespaced": namespaced, "verbs": ["get"]}
        for kind, (plural, namespaced) in SERVED[version].items()
        for part in ("", "/status")
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}


def kind_at(version: str, plural: str, *, namespaced: bool) -> str:
    """The kind with this address; empty where there is none."""
    served = SERVED.get(version, {})
    return next((kind for kind, found in served.items() if found == (plural, namespaced)), "")
