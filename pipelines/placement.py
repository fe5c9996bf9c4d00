"""Where the tasks of a pipeline run: image and resources of each, nodes, queue, secrets, time."""

from __future__ import annotations

from typing import Self

from kfp import kubernetes
from kfp.dsl import PipelineTask
from pydantic import Field, model_validator

from dinov2_core.config import Frozen
from k8s.launchers import Launcher, Processes, launch_of
from k8s.placement import Deadlines, NodePreference, NodeRequirement, PodPlacement, TrainingPods
from k8s.placement import PodResources as PodResources
from k8s.placement import Volume as Volume
from k8s.training import PRIORITY_LABEL, QUEUE_LABEL, SHARED_MEMORY, STAGE_LABEL, USER
from k8s.values import Quantity


class Resources(PodResources):
    """What a task, or each pod of its training, asks a cluster for; no effect on this machine."""

    cpu: Quantity = "2"
    """Processors, such as `4` or `500m`."""
    memory: Quantity = "8Gi"
    """Memory, such as `16Gi`."""


FOLLOWER = Resources(cpu="500m", memory="2Gi")
"""Of a step that follows a training on other pods."""


def without_gpus(resources: Resources) -> Resources:
    """Of a step whose ranks on other pods have the accelerators, and that works itself as well."""
    return resources.model_copy(update={"num_gpus": 0})


class StageResources(Frozen):
    """Resources of each stage."""

    curate: Resources = Resources()
    """Of the stage that curates. Where it embeds on pods of its own (a cluster launcher and
    curate.embedding_topology), each of those gets the same, and the stage's pod, which looks for
    copies afterwards, all but the accelerators."""
    pretrain: Resources = Resources()
    """Of the stage that pretrains; of each node, where it trains on several."""
    finetune: Resources = Resources()
    """Of the stage that trains at high resolution; of each node as well."""
    evaluate: Resources = Resources()
    """Of the stage that evaluates."""
    registry: Resources = Resources()
    """Of the stage that registers."""


class Retries(Frozen):
    """How often a step that failed is tried again; a training goes on from its checkpoint."""

    count: int = Field(2, ge=0, le=20)
    """Attempts after the first."""
    backoff_seconds: int = Field(60, ge=1)
    """Before the first of them."""
    factor: int = Field(2, ge=1, le=10)
    """By which the wait grows; Argo takes whole numbers only."""


class Placement(PodPlacement):
    """Where a cluster runs the pipeline; without effect on this machine."""

    launcher: Launcher = Processes()
    """How the ranks of a training, or of curation's embedding, are started: as `processes` of the
    stage's own pod, on pods of their own by a `trainjob` of Kubeflow Trainer v2, or by a
    `pytorchjob` of the operator v1."""
    deadlines: Deadlines = Deadlines()
    """How long things may take."""
    retries: Retries = Retries()
    """How often a step is tried again."""

    @model_validator(mode="after")
    def _launcher_places(self) -> Self:
        if not isinstance(self.launcher, Processes):
            return self
        for name in ("topology", "rdma"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} has no effect with launcher processes; leave it out, or set "
                    "launcher to trainjob"
                )
        return self

    @model_validator(mode="after")
    def _suspension_holds(self) -> Self:
        is_queued = self.queue is not None and not isinstance(self.launcher, Processes)
        if is_queued and getattr(self.launcher, "on_stop", "") == "suspend":
            raise ValueError(
                f"launcher.on_stop suspend does not last in queue {self.queue}: Kueue lets the "
                "job run again at once; set it to delete"
            )
        return self


def place(
    task: PipelineTask, *, resources: Resources, image: str, volume: Volume | None = None
) -> None:
    """Give a task its image, resources and volume, and leave reuse to the stages themselves.

    Kubeflow's cache knows names, not contents: a stage compares digests of what it reads.
    """
    if volume is not None:
        kubernetes.mount_pvc(task, pvc_name=volume.claim, mount_path=volume.mount_path)
    task.set_container_image(image)
    task.set_caching_options(False)
    task.set_cpu_request(resources.cpu)
    task.set_memory_request(resources.memory)
    task.set_memory_limit(resources.memory)
    if resources.num_gpus:
        task.set_accelerator_type(resources.accelerator)
        task.set_accelerator_limit(resources.num_gpus)


def place_on_cluster(
    task: PipelineTask, *, stage: str, placement: Placement, is_heavy: bool, follows: bool = False
) -> None:
    """Give a task what only a cluster has.

    Args:
        task: The step.
        stage: Name of the step, for its pod's label.
        placement: From the spec.
        is_heavy: Whether it trains or has accelerators itself, so that the nodes matter.
        follows: Whether it follows a training on other pods, which its own pod will own.
    """
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "dinopipe")
    kubernetes.add_pod_label(task, STAGE_LABEL, stage)
    for secret in placement.secrets:
        kubernetes.use_secret_as_env(task, secret.name, {key: key for key in secret.keys})
    if placement.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(placement.image_pull_secrets))
    # Kubeflow adds the rest of what the restricted Pod Security Standard asks for, but not this.
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.set_timeout(task, placement.deadlines.step_seconds)
    retries = placement.retries
    if retries.count:
        task.set_retry(
            retries.count,
            backoff_duration=f"{retries.backoff_seconds}s",
            backoff_factor=retries.factor,
            # Counts from the start of the first attempt, and ends a later one that is running.
            backoff_max_duration=f"{placement.deadlines.pipeline_seconds}s",
        )
    if is_heavy:
        _place_on_nodes(task, placement)
    if follows:
        for name, field in (
            ("POD_NAME", "metadata.name"),
            ("POD_UID", "metadata.uid"),
            ("POD_NAMESPACE", "metadata.namespace"),
        ):
            kubernetes.use_field_path_as_env(task, name, field)


def _place_on_nodes(task: PipelineTask, placement: Placement) -> None:
    for key, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for item in placement.tolerations:
        kubernetes.add_toleration(
            task,
            key=item.key or None,
            operator=item.operator,
            value=item.value or None,
            effect=item.effect or None,
            toleration_seconds=item.seconds,
        )
    affinity = placement.affinity
    if affinity is not None and affinity.required:
        kubernetes.add_node_affinity(task, [_expression(item) for item in affinity.required])
    for preference in affinity.preferred if affinity is not None else ():
        kubernetes.add_node_affinity(task, [_expression(preference)], weight=preference.weight)
    if placement.queue is not None:
        kubernetes.add_pod_label(task, QUEUE_LABEL, placement.queue)
    if placement.priority_class is not None:
        kubernetes.add_pod_label(task, PRIORITY_LABEL, placement.priority_class)
    if placement.shared_memory is not None:
        kubernetes.empty_dir_mount(
            task, SHARED_MEMORY, "/dev/shm", medium="Memory", size_limit=placement.shared_memory
        )
    for name, value in placement.environment.items():
        task.set_env_variable(name, value)


def _expression(requirement: NodeRequirement | NodePreference) -> dict[str, object]:
    found: dict[str, object] = {"key": requirement.key, "operator": requirement.operator}
    return found | ({"values": list(requirement.values)} if requirement.values else {})


def launcher_of(
    placement: Placement, *, resources: Resources, image: str, volume: Volume | None
) -> str:
    """The parameter that tells a stage how to start its ranks, JSON.

    Args:
        placement: From the spec.
        resources: Of each of their pods.
        image: Of the same pods.
        volume: Of the same pods; None where the work directory needs none.
    """
    common = {name: getattr(placement, name) for name in PodPlacement.model_fields}
    pods = TrainingPods(
        image=image,
        resources=PodResources(**resources.model_dump()),
        placement=PodPlacement(**common | {"volume": volume}),
        deadline_seconds=placement.deadlines.training_seconds,
    )
    return launch_of(placement.launcher, pods=pods).model_dump_json()
