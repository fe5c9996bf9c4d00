"""The kinds of Kueue and of External Secrets that our manifests use, no more of them than we use.

Kueue's fields and rules are those of the Go types in apis/kueue/v1beta2 of kubernetes-sigs/kueue;
its preemption values, and External Secrets as a whole, were written without their definitions at
hand.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[
    str,
    Field(
        max_length=253, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
    ),
]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
StopPolicy = Literal["None", "Hold", "HoldAndDrain"]


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, alias_generator=to_camel, validate_by_name=False
    )


class Metadata(Strict):
    name: Name
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class NamespacedMetadata(Metadata):
    namespace: Name


class Selector(Strict):
    match_labels: dict[str, str] = {}


class Quota(Strict):
    name: str
    nominal_quota: Quantity
    borrowing_limit: Quantity | None = None
    lending_limit: Quantity | None = None


class FlavorQuotas(Strict):
    name: Name
    resources: list[Quota] = Field(min_length=1, max_length=64)


class ResourceGroup(Strict):
    covered_resources: list[str] = Field(min_length=1, max_length=64)
    flavors: list[FlavorQuotas] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _all_are_covered(self) -> Self:
        for flavor in self.flavors:
            if [quota.name for quota in flavor.resources] != self.covered_resources:
                raise ValueError(
                    f"flavor {flavor.name} must list {self.covered_resources} in this order"
                )
        return self


class Preemption(Strict):
    reclaim_within_cohort: Literal["Never", "LowerPriority", "Any"] = "Never"
    within_cluster_queue: Literal["Never", "LowerPriority", "LowerOrNewerEqualPriority"] = "Never"


class ClusterQueueSpec(Strict):
    resource_groups: list[ResourceGroup] = Field(max_length=16)
    cohort_name: Name | None = None
    queueing_strategy: Literal["StrictFIFO", "BestEffortFIFO"] = "BestEffortFIFO"
    namespace_selector: Selector
    preemption: Preemption = Preemption()
    stop_policy: StopPolicy = "None"

    @model_validator(mode="after")
    def _borrows_within_a_cohort(self) -> Self:
        quotas = [q for g in self.resource_groups for f in g.flavors for q in f.resources]
        if self.cohort_name is None and any(q.borrowing_limit or q.lending_limit for q in quotas):
            raise ValueError("borrowingLimit and lendingLimit need a cohortName")
        return self


class ClusterQueue(Strict):
    api_version: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["ClusterQueue"]
    metadata: Metadata
    spec: ClusterQueueSpec


class LocalQueueSpec(Strict):
    cluster_queue: Name
    stop_policy: StopPolicy = "None"


class LocalQueue(Strict):
    api_version: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["LocalQueue"]
    metadata: NamespacedMetadata
    spec: LocalQueueSpec


class Toleration(Strict):
    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a value must be empty when operator is Exists")
        if self.key is None and self.operator != "Exists":
            raise ValueError("operator must be Exists when key is empty")
        return self


class ResourceFlavorSpec(Strict):
    node_labels: dict[str, str] = Field({}, max_length=8)
    tolerations: list[Toleration] = Field([], max_length=8)
    topology_name: Name | None = None

    @model_validator(mode="after")
    def _topology_has_nodes(self) -> Self:
        if self.topology_name is not None and not self.node_labels:
            raise ValueError("at least one nodeLabel is required when topology is set")
        return self


class ResourceFlavor(Strict):
    api_version: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["ResourceFlavor"]
    metadata: Metadata
    spec: ResourceFlavorSpec = ResourceFlavorSpec()


class WorkloadPriorityClass(Strict):
    api_version: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["WorkloadPriorityClass"]
    metadata: Metadata
    value: int = Field(ge=-(2**31), lt=2**31)
    description: str = Field("", max_length=2048)


class StoreReference(Strict):
    kind: Literal["SecretStore", "ClusterSecretStore"]
    name: Name


class SecretTarget(Strict):
    name: Name


class RemoteReference(Strict):
    key: str
    property: str | None = None


class SecretKey(Strict):
    secret_key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)
    remote_ref: RemoteReference


class ExternalSecretSpec(Strict):
    refresh_interval: str
    secret_store_ref: StoreReference
    target: SecretTarget
    data: list[SecretKey] = Field(min_length=1)


class ExternalSecret(Strict):
    api_version: Literal["external-secrets.io/v1"]
    kind: Literal["ExternalSecret"]
    metadata: NamespacedMetadata
    spec: ExternalSecretSpec


CUSTOM_KINDS: dict[str, type[Strict]] = {
    kind.__name__: kind
    for kind in (ClusterQueue, ExternalSecret, LocalQueue, ResourceFlavor, WorkloadPriorityClass)
}
