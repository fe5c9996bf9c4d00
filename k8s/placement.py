"""Where pods run and what they get: nodes, queue, devices, memory, secrets, time."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from k8s.values import (
    AcceleratorName,
    DnsLabel,
    DnsName,
    LabelKey,
    LabelValue,
    MountPath,
    Quantity,
    RdmaName,
    Values,
    VariableName,
)

OPEN_VARIABLES = r"(NCCL|FI|UCX|GLOO|TORCH|PYTORCH|OMP|KMP|RDMAV|OFI)_[A-Z0-9_]+"
"""Variables that may be set in the open: of networks and threads."""
SECRET_NAME = r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY)"
SECRET_VALUE = (
    r"://[^/\s]*:[^/\s]*@|-----BEGIN|\b(AKIA|ASIA)[A-Z0-9]{12,}|\b(ghp|gho|hf|glpat|xox[a-z])[_-]\w+"
    r"|\beyJ[\w-]{10,}|^(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9+/_=-]{32,}$"
)
"""Passwords in addresses, private keys, and tokens of well-known forms."""


class Toleration(Values):
    """A taint that pods may ignore."""

    key: LabelKey | Literal[""] = ""
    """Key of the taint; empty, with Exists, is every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the value counts."""
    value: LabelValue = ""
    """Value of the taint, for Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint; empty is every effect."""
    seconds: int | None = Field(None, ge=0)
    """How long a pod stays on a node that got the taint, for NoExecute; for ever when null."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError(
                f"value {self.value!r} has no effect with operator Exists; leave it out, or "
                "set operator to Equal"
            )
        if self.operator == "Equal" and not self.key:
            raise ValueError("operator Equal needs a key; name one, or set operator to Exists")
        if self.seconds is not None and self.effect != "NoExecute":
            raise ValueError(
                f"seconds {self.seconds} has no effect with effect {self.effect!r}; leave it out, "
                "or set effect to NoExecute"
            )
        return self


class NodeRequirement(Values):
    """What a label of a node must be."""

    key: LabelKey
    """Label of the node."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How it is compared."""
    values: tuple[LabelValue, ...] = ()
    """With what: some for In and NotIn, one whole number for Gt and Lt, none otherwise."""

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        match self.operator:
            case "In" | "NotIn":
                right, fits = "at least one value", len(self.values) > 0
            case "Exists" | "DoesNotExist":
                right, fits = "no values", not self.values
            case "Gt" | "Lt":
                right = "one whole number"
                fits = len(self.values) == 1 and re.fullmatch(r"-?\d+", self.values[0]) is not None
        if not fits:
            raise ValueError(
                f"values {list(self.values)} do not go with operator {self.operator}, which takes "
                f"{right}"
            )
        return self


class NodePreference(NodeRequirement):
    """What a label of a node had better be."""

    weight: int = Field(50, ge=1, le=100)
    """How much it counts against other preferences."""


class Affinity(Values):
    """Nodes that pods must, or had better, run on."""

    required: tuple[NodeRequirement, ...] = ()
    """All of them hold."""
    preferred: tuple[NodePreference, ...] = ()
    """Nodes with more of them are chosen first."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.required and not self.preferred:
            raise ValueError("has neither required nor preferred; give one, or leave it out")
        return self


class NodeTopology(Values):
    """Keeps the nodes of one training close together.

    With a queue, Kueue does it, and admits nothing unless the queue's flavor names a Topology.
    """

    level: LabelKey
    """Label of nodes that share a value when they are close, such as a rack or a fabric's block."""
    is_required: bool = False
    """Whether a training waits until all its pods fit in one such place."""


class SecretKeys(Values):
    """Keys of a Secret that pods see as environment variables of the same names."""

    name: DnsName
    """The Secret."""
    keys: tuple[VariableName, ...] = Field(min_length=1)
    """Its keys, such as AWS_SECRET_ACCESS_KEY."""


class Volume(Values):
    """A volume that the pods of all stages share."""

    claim: DnsName
    """PersistentVolumeClaim, ReadWriteMany where pods run on several nodes."""
    mount_path: MountPath
    """Where it is mounted: the work directory."""


class Rdma(Values):
    """RDMA devices of every training pod."""

    resource: RdmaName = "rdma/ib"
    """Resource name that the device plug-in gives."""
    count: int = Field(1, ge=1)
    """Devices of each pod."""


class Deadlines(Values):
    """How long things may take; each holds the one before it and the time to wait for nodes."""

    training_seconds: int = Field(7 * 86400, ge=60)
    """One training, from its start."""
    step_seconds: int = Field(8 * 86400, ge=60)
    """One step of the pipeline, waiting for quota and nodes included."""
    pipeline_seconds: int = Field(21 * 86400, ge=60)
    """The whole pipeline."""

    @model_validator(mode="after")
    def _are_nested(self) -> Self:
        if not self.training_seconds < self.step_seconds < self.pipeline_seconds:
            raise ValueError(
                f"training_seconds {self.training_seconds}, step_seconds {self.step_seconds} and "
                f"pipeline_seconds {self.pipeline_seconds} must grow in this order: a step that "
                "ends before its training would leave it without a follower"
            )
        return self


class PodPlacement(Values):
    """Nodes, queue, devices and environment of pods."""

    namespace: DnsLabel = "dinopipe"
    """Of the pipeline's pods and of its training jobs."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue that admits pods with accelerators and trainings; none when null."""
    priority_class: DnsName | None = None
    """Kueue's WorkloadPriorityClass; needs a queue."""
    node_selector: dict[LabelKey, LabelValue] = Field({})
    """Labels of nodes for pods that train or have accelerators; others may run anywhere."""
    tolerations: tuple[Toleration, ...] = ()
    """Of the same pods."""
    affinity: Affinity | None = None
    """Of the same pods."""
    topology: NodeTopology | None = None
    """How close the nodes of one training are."""
    shared_memory: Quantity | None = "4Gi"
    """Size of /dev/shm of pods that train or have accelerators; counts as their memory. When null,
    that of the training runtime, elsewhere the container runtime's own 64 MiB."""
    environment: dict[str, str] = Field({})
    """Variables of networks and threads for the same pods, such as NCCL_IB_HCA; no secrets."""
    secrets: tuple[SecretKeys, ...] = ()
    """Secrets that all pods see as environment variables."""
    image_pull_secrets: tuple[DnsName, ...] = ()
    """Secrets that all pods pull their image with."""
    rdma: Rdma | None = None
    """RDMA devices of training pods; none when null."""
    volume: Volume | None = None
    """Volume of all pods that holds the work directory; none when null, for s3:// ones."""
    training_service_account: DnsLabel = "dinopipe-trainer"
    """Of training pods; they need no rights at all."""

    @field_validator("environment")
    @classmethod
    def _is_open(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if re.fullmatch(OPEN_VARIABLES, name) is None:
                raise ValueError(
                    f"{name} may not be set here, only variables of networks and threads (NCCL_, "
                    "FI_, UCX_, GLOO_, TORCH_, OMP_ and the like); others come from secrets"
                )
            if re.search(SECRET_NAME, name) or re.search(SECRET_VALUE, value):
                raise ValueError(
                    f"{name} looks like a secret; take it out, put it in a Secret and name that "
                    "under secrets"
                )
        return environment

    @model_validator(mode="after")
    def _queue_holds(self) -> Self:
        if self.priority_class is not None and self.queue is None:
            raise ValueError(
                f"priority_class {self.priority_class} has no effect without a queue; set queue, "
                "or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _variables_are_unique(self) -> Self:
        names = [key for secret in self.secrets for key in secret.keys]
        names += list(self.environment)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} comes from two places; leave one of them out")
        return self


class PodResources(Values):
    """What one training pod asks for."""

    cpu: Quantity
    """Processors."""
    memory: Quantity
    """Memory."""
    num_gpus: int = Field(0, ge=0)
    """Accelerators."""
    accelerator: AcceleratorName = "nvidia.com/gpu"
    """Resource name of the accelerator."""


class TrainingPods(Values):
    """The pods of a training on a cluster."""

    image: str = Field(min_length=1)
    """Container image, by digest."""
    resources: PodResources
    """Of each pod."""
    placement: PodPlacement
    """Where they run."""
    deadline_seconds: int = Field(ge=60)
    """How long the training may take, from its start."""
