"""Where the tasks of a pipeline run: resources and image of each."""

from __future__ import annotations

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


def place(task: PipelineTask, *, resources: Resources, image: str) -> None:
    """Give a task its image and resources, and leave reuse to the stages themselves.

    Kubeflow's cache knows names, not contents: a stage compares digests of what it reads.
    """
    task.set_container_image(image)
    task.set_caching_options(False)
    task.set_cpu_request(resources.cpu)
    task.set_memory_request(resources.memory)
    task.set_memory_limit(resources.memory)
    if resources.num_gpus:
        task.set_accelerator_type(resources.accelerator)
        task.set_accelerator_limit(resources.num_gpus)
