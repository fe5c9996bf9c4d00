"""Ways of starting the ranks of a training, as a spec names them and as a stage is told them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from k8s.placement import TrainingPods
from k8s.values import DnsName, Values

RUNTIME = "dinopipe-fsdp-v1"
"""Our TrainingRuntime; a new version has a new name, because parts of it cannot be changed."""


class Processes(Values):
    """Ranks are processes in the stage's own pod, or on this machine."""

    kind: Literal["processes"] = "processes"


class _ClusterJob(Values):
    """What becomes of a job of the cluster."""

    on_stop: Literal["delete", "suspend"] = "delete"
    """What happens to it when the step that follows it is stopped or runs out of time."""
    after_success: Literal["delete", "keep"] = "delete"
    """What happens to it when it is done."""
    after_failure: Literal["delete", "keep"] = "keep"
    """What happens to it when it has failed; a kept one goes with the step's pod."""


class TrainJob(_ClusterJob):
    """A TrainJob of Kubeflow Trainer v2."""

    kind: Literal["trainjob"] = "trainjob"
    runtime: DnsName = RUNTIME
    """TrainingRuntime in the same namespace."""


class PyTorchJob(_ClusterJob):
    """A PyTorchJob, for clusters that still run Kubeflow's training operator v1."""

    kind: Literal["pytorchjob"] = "pytorchjob"
    max_restarts: int = Field(10, ge=0)
    """Container restarts before the job fails; the operator cannot tell wrong input apart."""


Launcher = Annotated[Processes | TrainJob | PyTorchJob, Field(discriminator="kind")]
"""As a spec names it."""


class TrainJobLaunch(TrainJob):
    """A TrainJob and its pods."""

    pods: TrainingPods
    """What the ranks run in."""


class PyTorchJobLaunch(PyTorchJob):
    """A PyTorchJob and its pods."""

    pods: TrainingPods
    """What the ranks run in."""


ClusterLaunch = TrainJobLaunch | PyTorchJobLaunch
Launch = Annotated[Processes | TrainJobLaunch | PyTorchJobLaunch, Field(discriminator="kind")]
"""As a stage is told it, in the parameter `launcher`."""


def read_launch(text: str) -> Processes | TrainJobLaunch | PyTorchJobLaunch:
    """The launch that a stage's parameter describes.

    Args:
        text: JSON, such as `{"kind":"processes"}`.

    Raises:
        pydantic.ValidationError: It is not one, with the path of what is wrong.
    """
    adapter: TypeAdapter[Processes | TrainJobLaunch | PyTorchJobLaunch] = TypeAdapter(Launch)
    return adapter.validate_json(text)


def launch_of(
    launcher: Processes | TrainJob | PyTorchJob, *, pods: TrainingPods
) -> Processes | TrainJobLaunch | PyTorchJobLaunch:
    """The launch of a spec's launcher with these pods."""
    match launcher:
        case Processes():
            return launcher
        case TrainJob():
            return TrainJobLaunch(**launcher.model_dump(), pods=pods)
        case PyTorchJob():
            return PyTorchJobLaunch(**launcher.model_dump(), pods=pods)
