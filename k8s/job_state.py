"""The state of a training job, read from the status that its controller writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from k8s.training import QUEUE_LABEL

Phase = Literal[
    "created", "waiting for quota", "suspended", "running", "restarting", "complete", "failed"
]
USER_ERROR_REASONS = ("PodFailurePolicy", "FailJobSetFailurePolicyAction")
"""Reasons of a failure that was not retried, because a pod ended with code 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """State of a job."""

    phase: Phase
    reason: str = ""
    """The controller's reason of a failure or a wait, one word."""
    message: str = ""
    """The controller's message."""
    progress_percent: int | None = None
    """Progress that the training reported to Trainer; None without that feature."""

    @property
    def is_finished(self) -> bool:
        """Whether its phase is final."""
        return self.phase in ("complete", "failed")

    @property
    def is_user_error(self) -> bool:
        """Whether it failed because of something that the user must change."""
        is_policy = self.reason in USER_ERROR_REASONS or "PodFailurePolicy" in self.message
        return self.phase == "failed" and is_policy

    def __str__(self) -> str:
        """Phase, and the controller's reason and message."""
        about = ": ".join(part for part in (self.reason, self.message) if part)
        return f"{self.phase} ({about})" if about else self.phase


def job_state(job: dict[str, Any], *, has_run: bool) -> JobState:
    """The state of a TrainJob.

    Args:
        job: The object as the API server gives it.
        has_run: Whether it has run before: then pods that are not ready are restarting.
    """
    status = job.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}

    def holds(kind: str) -> bool:
        return kind in conditions and bool(conditions[kind].get("status") == "True")

    def state(phase: Phase, kind: str) -> JobState:
        found = conditions[kind]
        return JobState(
            phase=phase, reason=found.get("reason", ""), message=found.get("message", "")
        )

    if holds("Complete"):
        return state("complete", "Complete")
    if holds("Failed"):
        return state("failed", "Failed")
    if holds("Suspended"):
        is_queued = QUEUE_LABEL in job["metadata"].get("labels", {})
        return state("waiting for quota" if is_queued else "suspended", "Suspended")
    progress = (status.get("trainerStatus") or {}).get("progressPercentage")
    if _pods_are_ready(status):
        return JobState(phase="running", progress_percent=progress)
    return JobState(phase="restarting" if has_run else "created", progress_percent=progress)


def _pods_are_ready(status: dict[str, Any]) -> bool:
    """A TrainJob has no condition for running, only the status of its jobs."""
    return any(item.get("ready", 0) > 0 for item in status.get("jobsStatus") or [])
