"""How a training job stands, read from the object that its controller keeps."""

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
    """Where a job stands."""

    phase: Phase
    reason: str = ""
    """One word of the controller, for a failure or a wait."""
    message: str = ""
    """A sentence of the controller."""
    progress_percent: int | None = None
    """What the training reported to Trainer; None without that feature."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.phase in ("complete", "failed")

    @property
    def is_user_error(self) -> bool:
        """Whether it failed with a user error."""
        is_user_error = self.reason in USER_ERROR_REASONS or "PodFailurePolicy" in self.message
        return self.phase == "failed" and is_user_error

    def __str__(self) -> str:
        """In words: phase, and what the controller says about it."""
        about = ": ".join(part for part in (self.reason, self.message) if part)
        return f"{self.phase} ({about})" if about else self.phase


def job_state(job: dict[str, Any], *, has_run: bool) -> JobState:
    """The state of a TrainJob.

    Args:
        job: The object as the API server gives it.
        has_run: Whether it was seen running before: then pods that are not ready are restarting.
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
    """A TrainJob has no condition of its own for running: its jobs say how they are."""
    return any(item.get("ready", 0) > 0 for item in status.get("jobsStatus") or [])
