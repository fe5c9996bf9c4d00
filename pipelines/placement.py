"""Where the tasks of a pipeline run: resources and image of each."""

from __future__ import annotations

from kfp import kubernetes
from kfp.dsl import PipelineTask
from pydantic import Field

from dinov2_core.config import Frozen

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


class Resources(Frozen):
    """What a task asks the cluster for; without effect on this machine."""

    cpu: str = Field("2", pattern=r"^[0-9]+(\.[0-9]+)?m?$")
    """Processors, such as `4` or `500m`."""
    memory: str = Field("8Gi", pattern=QUANTITY)
    """Memory, such as `16Gi`."""
    num_gpus: int = Field(0, ge=0)
    """Accelerators."""
    accelerator: str = Field("nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[a-z0-9._-]+$")
    """Resource name of the accelerator."""


class StageResources(Frozen):
    """Resources of each stage."""

    curate: Resources = Resources()
    """Of the stage that curates."""
    pretrain: Resources = Resources()
    """Of the stage that pretrains."""
    finetune: Resources = Resources()
    """Of the stage that trains at high resolution."""
    evaluate: Resources = Resources()
    """Of the stage that evaluates."""
    registry: Resources = Resources()
    """Of the stage that registers."""


class Volume(Frozen):
    """A volume that the pods of all stages share."""

    claim: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")
    """PersistentVolumeClaim, ReadWriteMany where pods run on several nodes."""
    mount_path: str = Field(pattern="^/")
    """Where it is mounted: the work directory."""


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
