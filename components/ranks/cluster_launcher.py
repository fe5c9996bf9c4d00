"""Starts ranks as a job of the cluster and follows it to its end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from components.ranks.exit_status import check_exit_status, error_of
from components.ranks.job import RanksJob, first_failure, remove_earlier_result
from components.ranks.job_log import JobLog
from components.runtime.progress import Reporter
from dinov2_core.errors import (
    ClusterRefused,
    ClusterUnavailable,
    DinopipeError,
    StageFailed,
    Stopped,
    UserError,
)
from k8s.cluster import AlreadyExists, Cluster
from k8s.job_state import JobState, job_state
from k8s.launchers import TrainJobLaunch
from k8s.training import HASH_ANNOTATION, Owner, Training, owner_reference
from k8s.trainjob import trainjob

logger = logging.getLogger(__name__)

SUSPENDED_ANNOTATION = "dinopipe/suspended-by-launcher"
RETRY_VARIABLE = "KFP_RETRY_INDEX"
"""Set by Kubeflow: 0 for the first attempt at a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PollingPolicy:
    """How often a job's state is read, and how long to wait; all in seconds."""

    shortest_pause: float = 1.0
    """Between two readings after a change."""
    longest_pause: float = 15.0
    """Between two readings without a change."""
    unreachable: float = 3600.0
    """Without a good answer of the API server, before the step gives up; the job goes on."""
    deletion: float = 900.0
    """For a job to be gone."""


def run_on_cluster(
    job: RanksJob,
    *,
    launch: TrainJobLaunch,
    training: Training,
    cluster: Cluster,
    report: Reporter,
    polling: PollingPolicy = PollingPolicy(),
) -> None:
    """Create the ranks' job, or adopt the one of an earlier attempt, and follow it.

    Raises:
        UserError: A rank met what the user must change.
        StageFailed: The job failed or is gone.
        Stopped: This step was stopped; the launch says whether its job is deleted or suspended.
        ClusterRefused: The cluster does not take the job.
        ClusterUnavailable: The job, which goes on, cannot be followed any more.
    """
    follower = _Follower(
        job=job,
        launch=launch,
        manifest=trainjob(training, runtime=launch.runtime),
        owner=training.owner,
        cluster=cluster,
        report=report,
        log=JobLog(cluster, job=training.name, report=report),
        polling=polling,
    )
    with _set_when_stopped(follower.stop):
        follower.run()


@contextmanager
def _set_when_stopped(stop: threading.Event) -> Iterator[None]:
    """Set an event on SIGTERM and on an interrupt."""

    def set_event(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    earlier = {name: signal.signal(name, set_event) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in earlier.items():
            signal.signal(name, handler)


@dataclass(slots=True, kw_only=True)
class _Follower:
    """One step that creates or adopts one job and follows it."""

    job: RanksJob
    launch: TrainJobLaunch
    manifest: dict[str, Any]
    owner: Owner | None
    cluster: Cluster
    report: Reporter
    log: JobLog
    polling: PollingPolicy
    stop: threading.Event = field(default_factory=threading.Event)
    is_holding: bool = False
    """Whether the job exists and is this step's."""
    last_message: str = ""

    @property
    def name(self) -> str:
        """Name of the job."""
        name: str = self.manifest["metadata"]["name"]
        return name

    @property
    def what(self) -> str:
        """Kind and name of the job, for messages."""
        return f"{self.manifest['kind']} {self.name}"

    def run(self) -> None:
        """From creation or adoption to the end."""
        try:
            self._start()
            state = self._follow()
            if not state.is_finished:
                raise Stopped(f"stopped; {self.what} can go on from what it saved")
        except ClusterUnavailable:  # the job goes on, and the next attempt adopts it
            raise
        except BaseException:
            self._let_go()
            raise
        self._finish(state)

    def _start(self) -> None:
        """Create or adopt the job as soon as an earlier one allows it."""
        deadline = time.monotonic() + self.polling.deletion
        unavailable: ClusterUnavailable | None = None
        while time.monotonic() < deadline:
            try:
                if self._try_to_start():
                    return
                unavailable = None
            except ClusterUnavailable as error:
                unavailable = error
                self._log_change(str(error))
            if self.stop.wait(self.polling.shortest_pause):
                raise Stopped(f"stopped before {self.what} was started")
        if unavailable is not None:
            raise unavailable
        raise StageFailed(
            f"{self.what} of an earlier attempt is not gone after {self.polling.deletion:.0f} s; "
            "look for pods that do not end and for finalizers, then start again"
        )

    def _try_to_start(self) -> bool:
        """Create the job, adopt an equal one, or have another or a failed one deleted."""
        found = self.cluster.get(self.name)
        if found is None and self.log.has_pods():
            self._log_change("waiting for pods of an earlier one to end")  # they may still write
        elif found is None:
            remove_earlier_result(self.job.directory)
            self.job.write()
            with suppress(AlreadyExists):  # made in between: read it again
                self.cluster.create(self.manifest)
                self.is_holding = True
                self._log_change("created")
        elif "deletionTimestamp" in found["metadata"]:
            self._log_change("waiting for an earlier one to be gone")
        elif self._can_be_adopted(found):
            self._adopt(found)
        else:
            self._log_change("replacing one that failed, has other settings or lost its results")
            self.cluster.delete(self.name)
        return self.is_holding

    def _can_be_adopted(self, found: dict[str, Any]) -> bool:
        """Whether a job does what this one would, has not failed, and left its results.

        Raises:
            UserError: It met one, and Kubeflow only tries the step again.
        """
        wanted = self.manifest["metadata"]["annotations"][HASH_ANNOTATION]
        annotations = found["metadata"].get("annotations") or {}
        if annotations.get(HASH_ANNOTATION) != wanted:
            return False
        state = job_state(found, has_run=False)
        if state.is_user_error and int(os.environ.get(RETRY_VARIABLE, "0")) > 0:
            raise self._failure(state)
        return self.job.is_finished() if state.phase == "complete" else state.phase != "failed"

    def _adopt(self, found: dict[str, Any]) -> None:
        """Make the job this pod's, and resume it if an earlier attempt suspended it."""
        change: dict[str, Any] = {}
        if self.owner is not None:
            change["metadata"] = {"ownerReferences": [owner_reference(self.owner)]}
        if SUSPENDED_ANNOTATION in (found["metadata"].get("annotations") or {}):
            change.setdefault("metadata", {})["annotations"] = {SUSPENDED_ANNOTATION: None}
            change["spec"] = {"suspend": False}
        if change:
            self.cluster.patch(self.name, change)
        self.is_holding = True
        self._log_change("adopted from an earlier attempt")

    def _follow(self) -> JobState:
        """Read the job's state until it is finished or this step is stopped."""
        state, has_run = JobState(phase="created"), False
        pause, last_answer = self.polling.shortest_pause, time.monotonic()
        while not self.stop.is_set():
            before = self.last_message
            try:
                found = self.cluster.get(self.name)
                if found is None:
                    self.is_holding = False
                    raise StageFailed(
                        f"{self.what}: it was deleted, by a user or with its owner; start again"
                    )
                state = job_state(found, has_run=has_run)
                self._log_change(str(state), percent=state.progress_percent)
                self.log.catch_up()
                last_answer = time.monotonic()
            except (ClusterUnavailable, ClusterRefused) as error:
                self._log_change(str(error))
                if time.monotonic() - last_answer > self.polling.unreachable:
                    raise ClusterUnavailable(f"{self.what}: {error}") from error
            has_run = has_run or state.phase == "running"
            if state.is_finished:
                return state
            if state.phase == "restarting":
                self._raise_user_error()
            is_changed = self.last_message != before
            pause = min(pause * 1.5, self.polling.longest_pause)
            pause = self.polling.shortest_pause if is_changed else pause
            self.stop.wait(pause)
        return state

    def _raise_user_error(self) -> None:
        """Do not let a user error be retried where the controller cannot tell it from a crash."""
        failure = first_failure(self.job.directory)
        if failure is not None and failure.is_user_error:
            raise error_of(failure)

    def _log_change(self, message: str, *, percent: int | None = None) -> None:
        """Log a message unless it is the last one again."""
        if percent is not None:
            self.report(self.job.work, percent, 100, unit="percent")
        if message != self.last_message:
            self.last_message = message
            logger.info("%s: %s", self.what, message)

    def _let_go(self) -> None:
        """Delete or suspend the job of a step that ends before it, unless another adopted it."""
        if not self.is_holding:
            return
        try:
            if self._is_adopted_by_another():
                self._log_change("adopted by another step; it goes on")
            elif self.launch.on_stop == "delete":
                self.cluster.delete(self.name)
                self._log_change("deleted; its ranks save their state first")
            else:
                change = {
                    "metadata": {"annotations": {SUSPENDED_ANNOTATION: "true"}},
                    "spec": {"suspend": True},
                }
                self.cluster.patch(self.name, change)
                self._log_change("suspended; the next attempt resumes it")
        except (ClusterUnavailable, ClusterRefused) as error:
            logger.warning("%s is left behind: %s", self.what, error)

    def _is_adopted_by_another(self) -> bool:
        found = self.cluster.get(self.name)
        owners = found["metadata"].get("ownerReferences") if found is not None else None
        uids = {owner["uid"] for owner in owners or []}
        return self.owner is not None and bool(uids) and self.owner.uid not in uids

    def _finish(self, state: JobState) -> None:
        """Raise what a finished job failed with, and delete it where the launch says so."""
        try:
            if state.phase == "failed":
                raise self._failure(state)
            check_exit_status(self.job, code=0)
        finally:
            is_done = state.phase == "complete"
            policy = self.launch.after_success if is_done else self.launch.after_failure
            if policy == "delete":
                with suppress(ClusterUnavailable, ClusterRefused):
                    self.cluster.delete(self.name)

    def _failure(self, state: JobState) -> DinopipeError:
        """Why the job failed: the rank's message first, then the cluster's."""
        failure = first_failure(self.job.directory)
        if failure is not None and failure.is_user_error:
            return error_of(failure)
        is_user_error = state.is_user_error
        why = "a user error (exit code 64), which is not retried" if is_user_error else str(state)
        ranks = [str(error_of(failure))] if failure is not None else []
        message = "\n".join([f"{self.what}: {why}", *ranks, *self.log.tail()])
        return UserError(message) if is_user_error else StageFailed(message)
