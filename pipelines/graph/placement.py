"""Placement of a pipeline's tasks: container, resources, nodes, queue, secrets, time limits."""

from __future__ import annotations

from kfp import kubernetes
from kfp.dsl import PipelineTask

from k8s.launchers import launch_of
from k8s.placement import (
    NodePreference,
    NodeRequirement,
    PodPlacement,
    PodResources,
    TrainingPods,
    Volume,
)
from k8s.training import PRIORITY_LABEL, QUEUE_LABEL, SHARED_MEMORY, STAGE_LABEL, USER
from pipelines.spec.placement import Placement, Resources


def set_container(task: PipelineTask, *, image: str) -> None:
    """Give a task its image; caching is left to the stages themselves.

    Kubeflow's cache compares names, a stage the digests of what it reads.
    """
    task.set_container_image(image)
    task.set_caching_options(False)


def set_resources(task: PipelineTask, *, resources: Resources, volume: Volume | None) -> None:
    """Request processors, memory and accelerators for a task, and mount its volume."""
    if volume is not None:
        kubernetes.mount_pvc(task, pvc_name=volume.claim, mount_path=volume.mount_path)
    task.set_cpu_request(resources.cpu)
    task.set_memory_request(resources.memory)
    task.set_memory_limit(resources.memory)
    if resources.num_gpus:
        task.set_accelerator_type(resources.accelerator)
        task.set_accelerator_limit(resources.num_gpus)


def place_on_cluster(
    task: PipelineTask, *, stage: str, placement: Placement, is_heavy: bool, follows: bool = False
) -> None:
    """Give a task labels, secrets, limits, retries and nodes.

    Args:
        task: Task of a stage.
        stage: Name of the stage, for its pod's label.
        placement: From the spec.
        is_heavy: Whether it trains or has accelerators itself, so that the nodes matter.
        follows: Whether it waits for a job on other pods, which its own pod will own.
    """
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "dinopipe")
    kubernetes.add_pod_label(task, STAGE_LABEL, stage)
    for secret in placement.secrets:
        kubernetes.use_secret_as_env(task, secret.name, {key: key for key in secret.keys})
    if placement.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(placement.image_pull_secrets))
    # Kubeflow adds the rest of what the restricted Pod Security Standard demands, but not this.
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
    """How a stage starts its ranks, JSON.

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
