"""Settings of pods on a cluster: nodes, queue, devices, memory, secrets, time limits."""

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
"""Variables that may be set by value: of networks and threads."""
SECRET_NAME = r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY)"
SECRET_VALUE = (
    r"://[^/\s]*:[^/\s]*@|-----BEGIN|\b(AKIA|ASIA)[A-Z0-9]{12,}|\b(ghp|gho|hf|glpat|xox[a-z])[_-]\w+"
    r"|\beyJ[\w-]{10,}|^(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9+/_=-]{32,}$"
)
"""Passwords in addresses, private keys, and tokens of well-known forms."""


class Toleration(Values):
    """A taint that pods tolerate."""

    key: LabelKey | Literal[""] = ""
    """Key of the taint; empty, with Exists, is every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists tolerates every value of the taint, Equal only `value`."""
    value: LabelValue = ""
    """Value of the taint, for Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint; empty is every effect."""
    seconds: int | None = Field(None, ge=0)
    """How long a pod stays on a node that gets the taint, for NoExecute; for ever when null."""

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
    """A condition on a label of a node."""

    key: LabelKey
    """Label of the node."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """Comparison of the label with `values`."""
    values: tuple[LabelValue, ...] = ()
    """At least one for In and NotIn, one whole number for Gt and Lt, none otherwise."""

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
    """A preferred condition on a label of a node."""

    weight: int = Field(50, ge=1, le=100)
    """Weight relative to other preferences."""


class Affinity(Values):
    """Required and preferred nodes of pods."""

    required: tuple[NodeRequirement, ...] = ()
    """Conditions that all hold."""
    preferred: tuple[NodePreference, ...] = ()
    """Conditions by which nodes are ranked."""

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not self.required and not self.preferred:
            raise ValueError("has neither required nor preferred; give one, or leave it out")
        return self


class NodeTopology(Values):
    """Keeps the nodes of one training close together.

    With a queue, Kueue does it, and admits nothing unless the queue's flavor names a Topology.
    """

    level: LabelKey
    """Label whose value close nodes share, such as a rack or a block of the fabric."""
    is_required: bool = False
    """Whether a training waits until all its pods fit on nodes with the same value."""


class SecretKeys(Values):
    """Keys of a Secret that pods get as environment variables of the same names."""

    name: DnsName
    """Name of the Secret."""
    keys: tuple[VariableName, ...] = Field(min_length=1)
    """Keys, such as AWS_SECRET_ACCESS_KEY."""


class Volume(Values):
    """A volume that the pods of all stages share."""

    claim: DnsName
    """PersistentVolumeClaim; ReadWriteMany if pods run on several nodes."""
    mount_path: MountPath
    """Mount path; the work directory lies below it."""


class Rdma(Values):
    """RDMA devices of every training pod."""

    resource: RdmaName = "rdma/ib"
    """Resource name of the device plug-in."""
    count: int = Field(1, ge=1)
    """Devices of each pod."""


class Deadlines(Values):
    """Time limits, each longer than the one before it."""

    training_seconds: int = Field(7 * 86400, ge=60)
    """Limit of one training, from its start."""
    step_seconds: int = Field(8 * 86400, ge=60)
    """Limit of one step of the pipeline, waiting for quota and nodes included."""
    pipeline_seconds: int = Field(21 * 86400, ge=60)
    """Limit of the whole pipeline."""

    @model_validator(mode="after")
    def _are_nested(self) -> Self:
        if not self.training_seconds < self.step_seconds < self.pipeline_seconds:
            raise ValueError(
                f"training_seconds {self.training_seconds}, step_seconds {self.step_seconds} and "
                f"pipeline_seconds {self.pipeline_seconds} must grow in this order: a step that "
                "ends before its training could not follow it"
            )
        return self


class PodPlacement(Values):
    """Nodes, queue, devices and environment of pods."""

    namespace: DnsLabel = "dinopipe"
    """Namespace of the pipeline's pods and of its training jobs."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue that admits pods with accelerators and trainings; none when null."""
    priority_class: DnsName | None = None
    """Kueue's WorkloadPriorityClass; needs a queue."""
    node_selector: dict[LabelKey, LabelValue] = Field({})
    """Labels of nodes for pods that train or have accelerators; others may run anywhere."""
    tolerations: tuple[Toleration, ...] = ()
    """Tolerations of the same pods."""
    affinity: Affinity | None = None
    """Node affinity of the same pods."""
    topology: NodeTopology | None = None
    """Distance between the nodes of one training; any when null."""
    shared_memory: Quantity | None = "4Gi"
    """Size of /dev/shm of pods that train or have accelerators; counts as their memory. When null,
    that of the training runtime, elsewhere the container runtime's own 64 MiB."""
    environment: dict[str, str] = Field({})
    """Variables of networks and threads for the same pods, such as NCCL_IB_HCA; no secrets."""
    secrets: tuple[SecretKeys, ...] = ()
    """Secrets that all pods get as environment variables."""
    image_pull_secrets: tuple[DnsName, ...] = ()
    """Secrets that all pods pull their image with."""
    rdma: Rdma | None = None
    """RDMA devices of training pods; none when null."""
    volume: Volume | None = None
    """Volume of all pods that holds the work directory; none when null, for s3:// ones."""
    training_service_account: DnsLabel = "dinopipe-trainer"
    """Service account of training pods; it needs no rights."""

    @field_validator("environment")
    @classmethod
    def _holds_no_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
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
    def _priority_has_a_queue(self) -> Self:
        if self.priority_class is not None and self.queue is None:
            raise ValueError(
                f"priority_class {self.priority_class} has no effect without a queue; set queue, "
                "or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _variables_have_one_source(self) -> Self:
        names = [key for secret in self.secrets for key in secret.keys]
        names += list(self.environment)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} has two sources; leave one of them out")
        return self


class PodResources(Values):
    """Resources of one training pod."""

    cpu: Quantity
    """Request of processors."""
    memory: Quantity
    """Request and limit of memory."""
    num_gpus: int = Field(0, ge=0)
    """Number of accelerators."""
    accelerator: AcceleratorName = "nvidia.com/gpu"
    """Resource name of the accelerator."""


class TrainingPods(Values):
    """The pods of a training on a cluster."""

    image: str = Field(min_length=1)
    """Container image, by digest."""
    resources: PodResources
    """Resources of each pod."""
    placement: PodPlacement
    """Nodes, queue, devices and environment."""
    deadline_seconds: int = Field(ge=60)
    """Time limit of the training, from its start."""
