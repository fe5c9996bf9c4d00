"""Starts ranks as a job of the cluster, follows it to its end and tells how it went."""

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

from components.ranks.cluster_job import rendered
from components.ranks.exit_status import Preempted, check_outcome, in_words
from components.ranks.job import RanksJob, first_failure, forget_outcome
from components.ranks.job_log import JobLog
from components.runtime.progress import Reporter
from components.runtime.stage import StageFailed
from k8s.cluster import AlreadyExists, Cluster, ClusterRefused, ClusterUnreachable
from k8s.job_kind import JobKind
from k8s.job_state import JobState, job_state
from k8s.launchers import TrainJobLaunch
from k8s.training import HASH_ANNOTATION, Owner, Training, owner_reference

logger = logging.getLogger(__name__)

SUSPENDED_ANNOTATION = "dinopipe/suspended-by-launcher"
RETRY_VARIABLE = "KFP_RETRY_INDEX"
"""Set by Kubeflow: 0 for the first attempt at a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often a follower looks, and how long it waits; all in seconds."""

    shortest_pause: float = 1.0
    """Between two looks after something has changed."""
    longest_pause: float = 15.0
    """Between two looks while nothing changes."""
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
    patience: Patience = Patience(),
) -> None:
    """Create the ranks' job, or adopt the one of an earlier attempt, and follow it.

    Raises:
        StageFailed: The job failed, is gone, or cannot be followed any more.
        Preempted: This step was told to stop; what becomes of the job is the launch's policy.
        ClusterRefused: The cluster does not take the job.
    """
    kind, manifest = rendered(launch, training=training)
    follower = _Follower(
        job=job,
        launch=launch,
        kind=kind,
        manifest=manifest,
        owner=training.owner,
        cluster=cluster,
        report=report,
        log=JobLog(cluster, job=training.name, report=report),
        patience=patience,
    )
    with _told_to_stop(follower.stop):
        follower.run()


@contextmanager
def _told_to_stop(stop: threading.Event) -> Iterator[None]:
    """Set an event on SIGTERM and on an interrupt."""

    def note(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    earlier = {name: signal.signal(name, note) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in earlier.items():
            signal.signal(name, handler)


@dataclass(slots=True, kw_only=True)
class _Follower:
    """One step's hold of one job."""

    job: RanksJob
    launch: TrainJobLaunch
    kind: JobKind
    manifest: dict[str, Any]
    owner: Owner | None
    cluster: Cluster
    report: Reporter
    log: JobLog
    patience: Patience
    stop: threading.Event = field(default_factory=threading.Event)
    told: str = ""

    @property
    def name(self) -> str:
        """Name of the job."""
        name: str = self.manifest["metadata"]["name"]
        return name

    def run(self) -> None:
        """From creation or adoption to the end."""
        try:
            self._start()
            state = self._follow()
        except (ClusterUnreachable, _Gone) as error:
            raise StageFailed(f"{self.what}: {error}") from error
        except _FailedForGood as error:
            raise StageFailed(str(error)) from error
        except BaseException:
            self._let_go()
            raise
        if not state.is_finished:
            self._let_go()
            raise Preempted(f"told to stop; {self.what} can go on from what it saved")
        self._finish(state)

    @property
    def what(self) -> str:
        """The job in words."""
        return f"{self.manifest['kind']} {self.name}"

    def _start(self) -> None:
        """Create the job, take over an equal one, or replace another or a failed one."""
        deadline = time.monotonic() + self.patience.deletion
        while time.monotonic() < deadline:
            found = self.cluster.get(self.kind, self.name)
            if found is None and self.log.has_pods():
                self._tell("waiting for pods of an earlier one to end")  # they may still write
            elif found is None:
                forget_outcome(self.job.directory)
                self.job.write()
                with suppress(AlreadyExists):  # made in between: look again
                    self.cluster.create(self.kind, self.manifest)
                    self._tell("created")
                    return
            elif "deletionTimestamp" in found["metadata"]:
                self._tell("waiting for an earlier one to be gone")
            elif self._can_be_adopted(found):
                self._adopt(found)
                return
            else:
                self._tell("replacing one that failed, has other settings or lost its results")
                self.cluster.delete(self.kind, self.name)
            if self.stop.wait(self.patience.shortest_pause):
                raise Preempted(f"told to stop before {self.what} was started")
        raise StageFailed(
            f"{self.what} of an earlier attempt is not gone after {self.patience.deletion:.0f} s; "
            "look for pods that do not end and for finalizers, then start again"
        )

    def _can_be_adopted(self, found: dict[str, Any]) -> bool:
        """Whether a job does what this one would, has not failed, and left what it was to make.

        Raises:
            _FailedForGood: It met wrong input, and Kubeflow only tries the step again.
        """
        wanted = self.manifest["metadata"]["annotations"][HASH_ANNOTATION]
        annotations = found["metadata"].get("annotations") or {}
        if annotations.get(HASH_ANNOTATION) != wanted:
            return False
        state = job_state(found, has_run=False)
        if state.is_user_error and int(os.environ.get(RETRY_VARIABLE, "0")) > 0:
            raise _FailedForGood(self._failure(state))
        return self.job.is_finished() if state.phase == "complete" else state.phase != "failed"

    def _adopt(self, found: dict[str, Any]) -> None:
        """Make the job this pod's, and let it run if an earlier attempt suspended it."""
        change: dict[str, Any] = {}
        if self.owner is not None:
            change["metadata"] = {"ownerReferences": [owner_reference(self.owner)]}
        if SUSPENDED_ANNOTATION in (found["metadata"].get("annotations") or {}):
            change.setdefault("metadata", {})["annotations"] = {SUSPENDED_ANNOTATION: None}
            change["spec"] = {"suspend": False}
        if change:
            self.cluster.patch(self.kind, self.name, change)
        self._tell("adopted from an earlier attempt")

    def _follow(self) -> JobState:
        """Look at the job until it is finished or this step is told to stop."""
        state, has_run = JobState(phase="created"), False
        pause, last_answer = self.patience.shortest_pause, time.monotonic()
        while not self.stop.is_set():
            before = self.told
            try:
                found = self.cluster.get(self.kind, self.name)
                if found is None:
                    raise _Gone("it was deleted, by a person or with its owner; start again")
                state = job_state(found, has_run=has_run)
                self._tell(str(state), percent=state.progress_percent)
                self.log.catch_up()
                last_answer = time.monotonic()
            except (ClusterUnreachable, ClusterRefused) as error:
                self._tell(str(error))
                if time.monotonic() - last_answer > self.patience.unreachable:
                    raise ClusterUnreachable(str(error)) from error
            has_run = has_run or state.phase == "running"
            if state.is_finished:
                return state
            if state.phase == "restarting":
                self._refuse_wrong_input()
            changed = self.told != before
            pause = min(pause * 1.5, self.patience.longest_pause)
            pause = self.patience.shortest_pause if changed else pause
            self.stop.wait(pause)
        return state

    def _refuse_wrong_input(self) -> None:
        """Do not let wrong input be tried again, where the operator cannot tell it."""
        said = first_failure(self.job.directory)
        if said is not None and said.can_be_fixed:
            raise StageFailed(in_words(said))

    def _tell(self, news: str, *, percent: int | None = None) -> None:
        """Log what has changed; the same is told once."""
        if percent is not None:
            self.report(self.job.work, percent, 100, unit="percent")
        if news != self.told:
            self.told = news
            logger.info("%s: %s", self.what, news)

    def _let_go(self) -> None:
        """Delete or suspend the job of a step that ends before it."""
        try:
            if self.launch.on_stop == "delete":
                self.cluster.delete(self.kind, self.name)
                self._tell("deleted; its ranks save what they are at first")
                return
            change = {
                "metadata": {"annotations": {SUSPENDED_ANNOTATION: "true"}},
                "spec": {"suspend": True},
            }
            self.cluster.patch(self.kind, self.name, change)
            self._tell("suspended; the next attempt lets it run again")
        except (ClusterUnreachable, ClusterRefused) as error:
            logger.warning("%s is left behind: %s", self.what, error)

    def _finish(self, state: JobState) -> None:
        """Tell how a finished job went, a failure with all that is known of it."""
        try:
            if state.phase == "failed":
                raise StageFailed(self._failure(state))
            check_outcome(self.job, code=0)
        finally:
            is_done = state.phase == "complete"
            policy = self.launch.after_success if is_done else self.launch.after_failure
            if policy == "delete":
                with suppress(ClusterUnreachable, ClusterRefused):
                    self.cluster.delete(self.kind, self.name)

    def _failure(self, state: JobState) -> str:
        """Why the job failed: the rank's own words first, then the cluster's."""
        said = first_failure(self.job.directory)
        if said is not None and said.can_be_fixed:
            return in_words(said)
        if state.is_user_error:
            why = "wrong input (exit code 64), which is not tried again"
        else:
            why = str(state)
        return "\n".join(
            [
                f"{self.what}: {why}",
                *([in_words(said)] if said is not None else []),
                *self.log.last_words(),
            ]
        )


class _Gone(Exception):
    """The job does not exist any more."""


class _FailedForGood(Exception):
    """Another attempt would fail in the same way."""
