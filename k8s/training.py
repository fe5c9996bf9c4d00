"""A training on a cluster: parts of a job's manifest that do not depend on its kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from k8s.placement import NodeRequirement, Toleration, TrainingPods
from k8s.values import dns_label, label_value

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
JOB_LABEL, RUN_LABEL, STAGE_LABEL = "dinopipe/job", "dinopipe/run", "dinopipe/stage"
HASH_ANNOTATION = "dinopipe/spec-sha256"
LONGEST_NAME = 40
"""Pods are called NAME-node-0-INDEX-SUFFIX, in 63 characters."""
USER = 10001
"""Numeric user and group of our image."""
SHARED_MEMORY, WORK = "shared-memory", "work"
"""Names of volumes; the runtime's own of the same name gives way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The pod that follows a training; the training is deleted together with it."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training: its command, ranks, environment and pods."""

    run_id: str
    """Id of the pipeline run."""
    run_name: str
    """Name of the pipeline run."""
    stage: str
    """Name of the stage."""
    command: tuple[str, ...]
    """Command of every pod; it reads PET_* itself."""
    num_nodes: int
    """Number of pods."""
    processes_per_node: int
    """Ranks of each pod."""
    environment: Mapping[str, str]
    """Variables of every pod; no secrets."""
    passing_environment: Mapping[str, str]
    """Variables that may differ between attempts at the same training."""
    content_sha256: str
    """Digest of what the command reads: other settings are another training."""
    pods: TrainingPods
    """Image, resources and placement of the pods."""
    owner: Owner | None = None
    """None outside of a cluster."""

    @property
    def name(self) -> str:
        """Name of the job: the same for every attempt of the same step of the same run."""
        run = hashlib.sha256(self.run_id.encode()).hexdigest()[:8]
        return dns_label(self.run_name[:20], run, self.stage, longest=LONGEST_NAME)

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the job and of its pods."""
        return {
            "app.kubernetes.io/part-of": "dinopipe",
            JOB_LABEL: self.name,
            RUN_LABEL: label_value(self.run_id),
            STAGE_LABEL: label_value(self.stage),
        }


def stamped(training: Training, *, render: Callable[[Training], dict[str, Any]]) -> dict[str, Any]:
    """A manifest with its own digest and its owner.

    The digest leaves out what differs between attempts of a step: its pod and passing variables.
    """
    identity = render(replace(training, passing_environment={}))
    canonical = json.dumps([identity, training.content_sha256], sort_keys=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    manifest = render(training)
    metadata = {**manifest["metadata"], "annotations": {HASH_ANNOTATION: digest}}
    if training.owner is not None:
        metadata["ownerReferences"] = [owner_reference(training.owner)]
    return {**manifest, "metadata": metadata}


def owner_reference(owner: Owner) -> dict[str, Any]:
    """A reference to the pod that does not delay the pod's deletion."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": owner.name,
        "uid": owner.uid,
        "controller": False,
        "blockOwnerDeletion": False,
    }


def metadata_of(training: Training) -> dict[str, Any]:
    """Name, namespace and labels of a job; Kueue reads the queue there."""
    placement = training.pods.placement
    labels = dict(training.labels)
    if placement.queue is not None:
        labels[QUEUE_LABEL] = placement.queue
    if placement.priority_class is not None:
        labels[PRIORITY_LABEL] = placement.priority_class
    return {"name": training.name, "namespace": placement.namespace, "labels": labels}


def environment_of(training: Training) -> list[dict[str, Any]]:
    """Variables of a pod: plain ones by value, secret ones by reference."""
    plain = {
        **training.environment,
        **training.passing_environment,
        **training.pods.placement.environment,
    }
    secret = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": item.name, "key": key}}}
        for item in training.pods.placement.secrets
        for key in item.keys
    ]
    return [{"name": name, "value": value} for name, value in sorted(plain.items())] + secret


def resources_of(pods: TrainingPods) -> dict[str, Any]:
    """Requests and limits of a pod; devices and memory are the same in both."""
    resources, rdma = pods.resources, pods.placement.rdma
    devices: dict[str, str] = {}
    if resources.num_gpus:
        devices[resources.accelerator] = str(resources.num_gpus)
    if rdma is not None:
        devices[rdma.resource] = str(rdma.count)
    limits = {"memory": resources.memory, **devices}
    return {"requests": {"cpu": resources.cpu, **limits}, "limits": limits}


def pod_metadata_of(training: Training) -> dict[str, Any]:
    """Labels of a pod, and what Kueue's topology-aware scheduling reads."""
    metadata: dict[str, Any] = {"labels": training.labels}
    placement = training.pods.placement
    if placement.topology is not None and placement.queue is not None:
        strictness = "required" if placement.topology.is_required else "preferred"
        key = f"kueue.x-k8s.io/podset-{strictness}-topology"
        metadata["annotations"] = {key: placement.topology.level}
    return metadata


def mounts_of(pods: TrainingPods) -> list[dict[str, Any]]:
    """Volume mounts of a pod's container."""
    mounts = []
    if pods.placement.shared_memory is not None:
        mounts.append({"name": SHARED_MEMORY, "mountPath": "/dev/shm"})
    if pods.placement.volume is not None:
        mounts.append({"name": WORK, "mountPath": pods.placement.volume.mount_path})
    return mounts


def pod_spec_of(training: Training) -> dict[str, Any]:
    """The spec of a pod without its containers and without empty keys."""
    placement = training.pods.placement
    spec = {
        "serviceAccountName": placement.training_service_account,
        "nodeSelector": dict(placement.node_selector),
        "tolerations": [_toleration(item) for item in placement.tolerations],
        "affinity": _affinity(training),
        "imagePullSecrets": [{"name": name} for name in placement.image_pull_secrets],
        "volumes": _volumes(training.pods),
    }
    return {key: value for key, value in spec.items() if value}


def _volumes(pods: TrainingPods) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = []
    placement = pods.placement
    if placement.shared_memory is not None:
        memory = {"medium": "Memory", "sizeLimit": placement.shared_memory}
        volumes.append({"name": SHARED_MEMORY, "emptyDir": memory})
    if placement.volume is not None:
        claim = {"claimName": placement.volume.claim}
        volumes.append({"name": WORK, "persistentVolumeClaim": claim})
    return volumes


def _toleration(toleration: Toleration) -> dict[str, Any]:
    found = {
        "key": toleration.key,
        "operator": toleration.operator,
        "value": toleration.value,
        "effect": toleration.effect,
    }
    given = {key: value for key, value in found.items() if value}
    return (
        given if toleration.seconds is None else given | {"tolerationSeconds": toleration.seconds}
    )


def _affinity(training: Training) -> dict[str, Any]:
    found = {"nodeAffinity": _node_affinity(training), "podAffinity": _pod_affinity(training)}
    return {key: value for key, value in found.items() if value}


def _node_affinity(training: Training) -> dict[str, Any]:
    affinity = training.pods.placement.affinity
    if affinity is None:
        return {}
    found: dict[str, Any] = {}
    if affinity.required:
        terms = [{"matchExpressions": [match_expression(item) for item in affinity.required]}]
        found["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    if affinity.preferred:
        found["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": item.weight, "preference": {"matchExpressions": [match_expression(item)]}}
            for item in affinity.preferred
        ]
    return found


def match_expression(requirement: NodeRequirement) -> dict[str, Any]:
    """A requirement of a node's label."""
    found = {"key": requirement.key, "operator": requirement.operator}
    return found | ({"values": list(requirement.values)} if requirement.values else {})


def _pod_affinity(training: Training) -> dict[str, Any]:
    """Without Kueue, pods of one training prefer or require nodes close to each other."""
    placement = training.pods.placement
    if placement.topology is None or placement.queue is not None:
        return {}
    term = {
        "labelSelector": {"matchLabels": {JOB_LABEL: training.name}},
        "topologyKey": placement.topology.level,
    }
    if placement.topology.is_required:
        return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    weighted = {"weight": 100, "podAffinityTerm": term}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [weighted]}
