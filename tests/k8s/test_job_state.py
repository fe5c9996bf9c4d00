from __future__ import annotations

from typing import Any

import pytest

from k8s.job_state import job_state
from k8s.training import QUEUE_LABEL


def job(
    *conditions: tuple[str, str], ready: int | None = None, labels: dict[str, str] | None = None
) -> dict[str, Any]:
    status: dict[str, Any] = {
        "conditions": [
            {"type": kind, "status": holds, "reason": f"{kind}Reason", "message": "why"}
            for kind, holds in conditions
        ]
    }
    if ready is not None:
        status["jobsStatus"] = [{"name": "node", "ready": ready, "active": 1}]
    return {"metadata": {"labels": labels or {}}, "status": status}


@pytest.mark.parametrize(
    ("found", "has_run", "phase"),
    [
        ({"metadata": {}}, False, "created"),
        (job(), False, "created"),
        (job(ready=0), False, "created"),
        (job(("Suspended", "True")), False, "suspended"),
        (job(("Suspended", "True"), labels={QUEUE_LABEL: "q"}), False, "waiting for quota"),
        (job(("Suspended", "False"), ready=1, labels={QUEUE_LABEL: "q"}), False, "running"),
        (job(ready=1), True, "running"),
        (job(ready=0), True, "restarting"),
        (job(("Complete", "True"), ready=0), True, "complete"),
        (job(("Failed", "True"), ready=1), True, "failed"),
    ],
)
def test_each_state_has_its_phase(found: dict[str, Any], has_run: bool, phase: str) -> None:
    state = job_state(found, has_run=has_run)
    assert state.phase == phase
    assert state.is_finished == (phase in ("complete", "failed"))


def test_a_failure_has_its_reason() -> None:
    state = job_state(job(("Failed", "True")), has_run=True)
    assert str(state) == "failed (FailedReason: why)"
    assert not state.is_user_error


@pytest.mark.parametrize("reason", ["PodFailurePolicy", "FailJobSetFailurePolicyAction"])
def test_wrong_input_is_a_failure_of_its_own_kind(reason: str) -> None:
    found = job(("Failed", "True"))
    found["status"]["conditions"][0]["reason"] = reason
    assert job_state(found, has_run=True).is_user_error


def test_progress_is_what_the_training_reported_to_trainer() -> None:
    found = job(ready=1)
    found["status"]["trainerStatus"] = {"progressPercentage": 40}
    assert job_state(found, has_run=False).progress_percent == 40
