"""Settings of placement: resources of a task, launcher, deadlines and retries."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dinov2_core.config.frozen import Frozen
from k8s.launchers import Launcher, Processes
from k8s.placement import Deadlines, PodPlacement, PodResources
from k8s.values import Quantity


class Resources(PodResources):
    """What a task, or each pod of its training, requests; no effect on this machine."""

    cpu: Quantity = "2"
    """Processors, such as `4` or `500m`."""
    memory: Quantity = "8Gi"
    """Memory, such as `16Gi`."""


FOLLOWER = Resources(cpu="500m", memory="2Gi")
"""Of a task that only waits for a training on other pods."""


def without_gpus(resources: Resources) -> Resources:
    """Of a task whose ranks on other pods have the accelerators, and that works itself as well."""
    return resources.model_copy(update={"num_gpus": 0})


class Retries(Frozen):
    """How often a failed task is retried; a training continues from its checkpoint."""

    count: int = Field(2, ge=0, le=20)
    """Attempts after the first."""
    backoff_seconds: int = Field(60, ge=1)
    """Wait before the first retry."""
    factor: int = Field(2, ge=1, le=10)
    """Factor by which the wait grows; Argo accepts whole numbers only."""


class Placement(PodPlacement):
    """Where a cluster runs the pipeline; no effect on this machine."""

    launcher: Launcher = Processes()
    """How the ranks of a training, or of curation's embedding, are started: as `processes` of the
    stage's own pod, or on pods of their own by a `trainjob` of Kubeflow Trainer v2."""
    deadlines: Deadlines = Deadlines()
    """Time limits of tasks, trainings and the pipeline."""
    retries: Retries = Retries()
    """How often a failed task is retried."""

    @model_validator(mode="after")
    def _launcher_has_settings(self) -> Self:
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
    def _suspension_lasts(self) -> Self:
        is_queued = self.queue is not None and not isinstance(self.launcher, Processes)
        if is_queued and getattr(self.launcher, "on_stop", "") == "suspend":
            raise ValueError(
                f"launcher.on_stop suspend does not last in queue {self.queue}: Kueue lets the "
                "job run again at once; set it to delete"
            )
        return self
