"""Launchers of ranks: settings of a spec, and the parameter of a stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter

from k8s.placement import TrainingPods
from k8s.values import DnsName, Values

RUNTIME = "dinopipe-fsdp-v1"
"""Our TrainingRuntime; a new version has a new name, because parts of it cannot be changed."""


class Processes(Values):
    """Ranks are processes in the stage's own pod, or on this machine."""

    kind: Literal["processes"] = "processes"


class TrainJob(Values):
    """A TrainJob of Kubeflow Trainer v2."""

    on_stop: Literal["delete", "suspend"] = "delete"
    """What happens to it when the step that follows it is stopped or exceeds its time limit."""
    after_success: Literal["delete", "keep"] = "delete"
    """What happens to it when it has succeeded."""
    after_failure: Literal["delete", "keep"] = "keep"
    """What happens to it when it has failed; a kept one is deleted with the step's pod."""
    kind: Literal["trainjob"] = "trainjob"
    runtime: DnsName = RUNTIME
    """TrainingRuntime in the same namespace."""


class TrainJobLaunch(TrainJob):
    """A TrainJob and its pods."""

    pods: TrainingPods
    """Image, resources and placement of the pods."""


def _check_not_pytorchjob(value: Any) -> Any:
    if isinstance(value, dict) and value.get("kind") == "pytorchjob":
        raise ValueError(
            "kind pytorchjob is no longer supported, because Kubeflow's training operator v1 is "
            "deprecated; install Kubeflow Trainer v2 and set kind to trainjob (no max_restarts)"
        )
    return value


Launcher = Annotated[
    Annotated[Processes | TrainJob, Field(discriminator="kind")],
    BeforeValidator(_check_not_pytorchjob),
]
"""As a spec names it."""

Launch = Annotated[Processes | TrainJobLaunch, Field(discriminator="kind")]
"""As a stage receives it, in the parameter `launcher`."""


def read_launch(text: str) -> Processes | TrainJobLaunch:
    """The launch that a stage's parameter describes.

    Args:
        text: JSON, such as `{"kind":"processes"}`.

    Raises:
        pydantic.ValidationError: It is not one, with the path of what is wrong.
    """
    adapter: TypeAdapter[Processes | TrainJobLaunch] = TypeAdapter(Launch)
    return adapter.validate_json(text)


def launch_of(launcher: Processes | TrainJob, *, pods: TrainingPods) -> Processes | TrainJobLaunch:
    """The launch of a spec's launcher with these pods."""
    match launcher:
        case Processes():
            return launcher
        case TrainJob():
            return TrainJobLaunch(**launcher.model_dump(), pods=pods)
