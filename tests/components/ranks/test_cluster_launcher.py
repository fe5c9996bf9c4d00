"""cluster_launcher: jobs created, adopted, replaced and followed on a loopback API server."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.ranks.cluster_job import training_of
from components.ranks.cluster_launcher import PollingPolicy, run_on_cluster
from components.ranks.job import RESULT, write_failure
from components.runtime.context import RunContext
from components.runtime.progress import Reporter
from components.runtime.storage import delete
from components.train.config import Topology, TrainStage
from components.train.job import Job, Result, read_result, write_result
from dinov2_core.errors import (
    ClusterRefused,
    ClusterUnavailable,
    LeaseLost,
    SettingsError,
    StageFailed,
    Stopped,
    UserError,
)
from k8s.launchers import RUNTIME, TrainJob, TrainJobLaunch, launch_of
from k8s.training import HASH_ANNOTATION, QUEUE_LABEL, Owner
from k8s.trainjob import trainjob
from tests.golden.manifests import BARE
from tests.k8s.api_server import ApiServer, api_server

Step = Callable[[dict[str, Any]], None]
QUICK = PollingPolicy(shortest_pause=0.01, longest_pause=0.05, unreachable=0.2, deletion=3)
DONE = Result(
    is_finished=True, step=60, final_losses={}, images_per_second=1.0, teacher_sha256="0" * 64
)
OWNER = Owner(name="step-pod", uid="u1")
TRAIN_JOB = TrainJob()


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture
def job(stage: TrainStage, tmp_path: Path) -> Job:
    directory = tmp_path / "stage"
    context = RunContext(workdir=str(tmp_path), run_id="run-1", run_name="vits14")
    return Job(
        stage_name="pretrain",
        stage=stage.model_copy(update={"topology": Topology(num_nodes=2)}),
        context=context,
        directory=str(directory),
        shards="shards",
        mlflow_run_id="m1",
    )


def follow(
    job: Job,
    server: ApiServer,
    *,
    launcher: TrainJob = TRAIN_JOB,
    owner: Owner = OWNER,
) -> Result | None:
    launch = launch_of(launcher, pods=BARE)
    assert isinstance(launch, TrainJobLaunch)
    run_on_cluster(
        job,
        launch=launch,
        training=training_of(job, pods=BARE, owner=owner),
        cluster=server.cluster(),
        report=Reporter(None, stage="pretrain"),
        polling=QUICK,
    )
    return read_result(job)


def name_of(job: Job) -> str:
    return training_of(job, pods=BARE, owner=None).name


def status(*conditions: tuple[str, str], ready: int = 0, message: str = "") -> Step:
    """A controller's doing: the status that a job gets."""

    def apply(found: dict[str, Any]) -> None:
        found["status"] = {
            "conditions": [
                {"type": kind, "status": "True", "reason": reason, "message": message}
                for kind, reason in conditions
            ],
            "jobsStatus": [{"name": "node", "ready": ready}],
        }

    return apply


def play(server: ApiServer, job: Job, *steps: Step) -> None:
    server.script[name_of(job)] = deque(steps)


def finishing(job: Job) -> Step:
    complete = status(("Complete", "AllJobsCompleted"))

    def apply(found: dict[str, Any]) -> None:
        write_result(job, DONE)
        complete(found)

    return apply


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    prefix = "TrainJob vits14-"
    return [line.partition(": ")[2] for line in caplog.messages if line.startswith(prefix)]


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="components")


def test_a_job_is_created_followed_and_deleted_when_done(
    server: ApiServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    play(server, job, status(ready=2), status(ready=2), finishing(job))
    made: list[dict[str, Any]] = []
    server.script[name_of(job)].appendleft(made.append)
    assert follow(job, server, launcher=TrainJob(runtime="ours-v2")) == DONE
    assert messages(caplog) == ["created", "running", "complete (AllJobsCompleted)"]
    (manifest,) = made
    assert manifest["metadata"]["ownerReferences"][0]["uid"] == "u1"
    assert manifest["spec"]["runtimeRef"]["name"] == "ours-v2"
    trainer = manifest["spec"]["trainer"]
    assert trainer["command"] == [
        "python3",
        "-m",
        "components.ranks.torchrun_entry",
        "components.train.worker",
        job.uri,
    ]
    assert {item["name"]: item.get("value") for item in trainer["env"]} == {
        "MLFLOW_EXPERIMENT_NAME": "dinopipe",
        "MLFLOW_RUN_ID": "m1",
        "MLFLOW_TRACKING_URI": job.context.resolved_tracking_uri,
        "OMP_NUM_THREADS": "2",
    }
    assert Job.read(job.uri) == job
    assert server.made("DELETE") == server.made("GET")[:1]


def test_quota_running_and_restarting_are_told_apart(
    server: ApiServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    queued = status(("Suspended", "Suspended"), message="waits")

    def in_queue(found: dict[str, Any]) -> None:
        found["metadata"]["labels"][QUEUE_LABEL] = "q"
        queued(found)

    steps = [in_queue, in_queue, status(ready=2), status(), status(ready=2), finishing(job)]
    play(server, job, *steps)
    follow(job, server)
    assert messages(caplog) == [
        "created",
        "waiting for quota (Suspended: waits)",
        "running",
        "restarting",
        "running",
        "complete (AllJobsCompleted)",
    ]


def test_a_retried_step_adopts_the_running_job(
    server: ApiServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    training = training_of(job, pods=BARE, owner=OWNER)
    server.cluster().create(trainjob(training, runtime=RUNTIME))
    play(server, job, status(ready=2), status(ready=2), finishing(job))
    retried = job.model_copy(update={"mlflow_run_id": "m2"})
    assert follow(retried, server, owner=Owner(name="second", uid="u2")) == DONE
    assert messages(caplog)[0] == "adopted from an earlier attempt"
    assert len(server.made("POST")) == 1


def test_an_adopted_job_belongs_to_the_new_pod(server: ApiServer, job: Job) -> None:
    keeping = TrainJob(after_success="keep")
    play(server, job, finishing(job))
    follow(job, server, launcher=keeping)
    assert follow(job, server, launcher=keeping, owner=Owner(name="second", uid="u2")) == DONE
    (found,) = server.jobs.values()
    assert [owner["uid"] for owner in found["metadata"]["ownerReferences"]] == ["u2"]
    assert len(server.made("POST")) == 1


def test_a_job_whose_results_are_gone_is_replaced(server: ApiServer, job: Job) -> None:
    keeping = TrainJob(after_success="keep")
    play(server, job, finishing(job))
    follow(job, server, launcher=keeping)
    delete(f"{job.directory}/{RESULT}")
    original = server.answer

    def answer(method: str, *rest: Any) -> object:
        made = original(method, *rest)
        if method == "POST":
            play(server, job, finishing(job))
        return made

    server.answer = answer  # type: ignore[method-assign]
    assert follow(job, server, launcher=keeping) == DONE
    assert len(server.made("POST")) == 2


def test_a_failed_job_is_replaced_once_it_is_gone(
    server: ApiServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    play(server, job, status(("Failed", "ReachedMaxRestarts")))
    with pytest.raises(StageFailed, match=r"failed \(ReachedMaxRestarts\)"):
        follow(job, server)
    write_failure(job.directory, rank=1, error=RuntimeError("old"))
    caplog.clear()
    original = server.answer

    def answer(method: str, *rest: Any) -> object:
        made = original(method, *rest)
        if method == "POST":
            play(server, job, finishing(job))
        return made

    server.answer = answer  # type: ignore[method-assign]
    assert follow(job, server) == DONE
    assert messages(caplog) == [
        "replacing one that failed, has other settings or lost its results",
        "waiting for an earlier one to be gone",
        "created",
        "complete (AllJobsCompleted)",
    ]


def test_a_job_with_other_settings_is_replaced(server: ApiServer, job: Job) -> None:
    keeping = TrainJob(after_success="keep")
    play(server, job, finishing(job))
    follow(job, server, launcher=keeping)
    (first,) = server.jobs.values()
    other = job.model_copy(update={"shards": "others"})
    original = server.answer

    def answer(method: str, *rest: Any) -> object:
        made = original(method, *rest)
        if method == "POST":
            play(server, job, finishing(job))
        return made

    server.answer = answer  # type: ignore[method-assign]
    follow(other, server, launcher=keeping)
    (second,) = server.jobs.values()
    digests = [item["metadata"]["annotations"][HASH_ANNOTATION] for item in (first, second)]
    assert digests[0] != digests[1]


def test_a_job_that_does_not_go_is_reported(server: ApiServer, job: Job) -> None:
    play(server, job, finishing(job))
    follow(job, server, launcher=TrainJob(after_success="keep"))
    server.looks_until_gone = 1000
    other = job.model_copy(update={"shards": "others"})
    with pytest.raises(StageFailed, match="is not gone after 3 s; look for pods that do not end"):
        follow(other, server)


def test_a_lost_job_is_reported(server: ApiServer, job: Job) -> None:
    def lose(found: dict[str, Any]) -> None:
        server.jobs.pop(found["metadata"]["name"])

    play(server, job, status(ready=2), lose)
    with pytest.raises(StageFailed, match="it was deleted, by a user or with its owner"):
        follow(job, server)
    assert not server.made("DELETE")


def test_an_api_server_that_is_away_for_a_while_is_waited_for(
    server: ApiServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    def fall_over(_: dict[str, Any]) -> None:
        server.faults.extend([(503, {})] * 6)

    play(server, job, fall_over, status(ready=2), finishing(job))
    assert follow(job, server) == DONE
    assert len(server.made("FAULT")) == 6


def test_a_right_that_is_missing_for_a_while_does_not_end_a_training(
    server: ApiServer, job: Job
) -> None:
    def lock_out(_: dict[str, Any]) -> None:
        server.faults.extend([(401, {}), (403, {})])

    play(server, job, lock_out, status(ready=2), finishing(job))
    assert follow(job, server) == DONE
    assert len(server.made("FAULT")) == 2


def test_an_api_server_that_stays_away_leaves_the_job_running(server: ApiServer, job: Job) -> None:
    def fall_over(_: dict[str, Any]) -> None:
        server.faults.extend([(503, {})] * 1000)

    play(server, job, fall_over)
    with pytest.raises(
        ClusterUnavailable, match=r"the API server does not answer \(503: not now\)"
    ):
        follow(job, server)
    assert server.jobs
    assert not server.made("DELETE")


def pod_of(job: Job) -> dict[str, Any]:
    labels = {
        "jobset.sigs.k8s.io/jobset-name": name_of(job),
        "batch.kubernetes.io/job-completion-index": "0",
    }
    return {"metadata": {"name": "node-0", "labels": labels}, "status": {"phase": "Running"}}


def test_pods_that_outlive_their_job_are_waited_for(
    server: ApiServer, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer deletes what is past its deadline without waiting for the pods."""
    server.pods.append(pod_of(job))
    threading.Timer(0.3, server.pods[0]["status"].update, [{"phase": "Failed"}]).start()
    play(server, job, finishing(job))
    assert follow(job, server) == DONE
    assert messages(caplog)[:2] == ["waiting for pods of an earlier one to end", "created"]


def test_a_failure_shows_the_last_lines_and_events(server: ApiServer, job: Job) -> None:
    server.logs["node-0"] = ["2026-01-01T00:00:00.1Z CUDA error: an illegal memory access"]
    server.events.append(
        {"involvedObject": {"name": "node-0"}, "reason": "OOMKilled", "message": "memory"}
    )

    def start(found: dict[str, Any]) -> None:
        server.pods.append(pod_of(job))
        status(ready=2)(found)

    play(server, job, start, status(("Failed", "ReachedMaxRestarts")))
    with pytest.raises(StageFailed) as failed:
        follow(job, server)
    assert str(failed.value).splitlines()[1:] == [
        "  CUDA error: an illegal memory access",
        "  node-0: OOMKilled: memory",
    ]


def test_a_user_error_has_the_rank_s_own_message(server: ApiServer, job: Job) -> None:
    failed = status(("Failed", "FailJobSetFailurePolicyAction"))

    def fail(found: dict[str, Any]) -> None:
        write_failure(job.directory, rank=1, error=SettingsError("choose a smaller batch"))
        failed(found)

    play(server, job, fail)
    with pytest.raises(UserError, match=r"^choose a smaller batch$"):
        follow(job, server)


def test_a_user_error_is_not_retried_by_kubeflow(
    server: ApiServer, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(server, job, status(("Failed", "FailJobSetFailurePolicyAction")))
    for attempt in ("0", "1", "2"):
        monkeypatch.setenv("KFP_RETRY_INDEX", attempt)
        with pytest.raises(UserError, match=r"a user error \(exit code 64\)"):
            follow(job, server)
    assert len(server.made("POST")) == 1
    assert not server.made("DELETE")


def test_a_user_error_without_a_message_is_still_one(server: ApiServer, job: Job) -> None:
    play(server, job, status(("Failed", "FailJobSetFailurePolicyAction")))
    with pytest.raises(UserError, match=r"a user error \(exit code 64\), which is not retried"):
        follow(job, server)


def test_a_user_error_ends_a_job_that_its_controller_restarts(server: ApiServer, job: Job) -> None:
    running, restarting = status(ready=2), status()

    def restart(found: dict[str, Any]) -> None:
        write_failure(job.directory, rank=0, error=SettingsError("choose another"))
        restarting(found)

    play(server, job, running, restart, restarting, restarting)
    with pytest.raises(UserError, match=r"^choose another$"):
        follow(job, server)
    assert len(server.made("DELETE")) == 1


def test_a_job_is_done_but_its_files_say_otherwise(server: ApiServer, job: Job) -> None:
    play(server, job, status(("Complete", "AllJobsCompleted")))
    with pytest.raises(StageFailed, match="the ranks ended with code 0 and no result"):
        follow(job, server)


def test_a_stopped_step_deletes_its_job(server: ApiServer, job: Job) -> None:
    def stop(_: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    play(server, job, status(ready=2), stop)
    with pytest.raises(Stopped, match="can go on from what it saved"):
        follow(job, server)
    assert len(server.made("DELETE")) == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("is_adopted", [False, True])
def test_a_step_that_lost_its_lease_ends_its_job_unless_another_step_adopted_it(
    server: ApiServer, job: Job, is_adopted: bool
) -> None:
    def interrupt(*_: object) -> None:
        raise LeaseLost("taken over by run b")

    def take_over(found: dict[str, Any]) -> None:
        if is_adopted:
            found["metadata"]["ownerReferences"] = [{"uid": "of another step"}]
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, interrupt)
    play(server, job, status(ready=2), take_over)
    try:
        with pytest.raises(LeaseLost):
            follow(job, server)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(server.made("DELETE")) == (not is_adopted)


def test_a_suspended_job_runs_again_for_the_next_attempt(server: ApiServer, job: Job) -> None:
    launcher = TrainJob(on_stop="suspend")

    def stop(_: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def is_suspended() -> object:
        (found,) = server.jobs.values()
        return found["spec"].get("suspend")

    play(server, job, stop)
    with pytest.raises(Stopped):
        follow(job, server, launcher=launcher)
    assert is_suspended() is True
    states: list[object] = []
    play(server, job, lambda _: None, lambda _: states.append(is_suspended()), finishing(job))
    assert follow(job, server, launcher=launcher) == DONE
    assert states == [False]
    assert len(server.made("POST")) == 1


def test_a_job_that_the_cluster_does_not_take_is_refused(server: ApiServer, job: Job) -> None:
    server.forbidden.add("POST")
    with pytest.raises(ClusterRefused, match="give the step's service account the launcher's Role"):
        follow(job, server)


def test_an_api_server_that_is_away_at_the_start_is_waited_for(server: ApiServer, job: Job) -> None:
    server.faults.extend([(503, {})] * 12)
    play(server, job, finishing(job))
    assert follow(job, server) == DONE
    assert len(server.made("FAULT")) == 12
    assert len(server.made("POST")) == 1


@pytest.mark.parametrize("policy", ["delete", "keep"])
def test_a_failed_job_is_kept_or_deleted_by_policy(
    server: ApiServer, job: Job, policy: Any
) -> None:
    play(server, job, status(("Failed", "DeadlineExceeded")))
    with pytest.raises(StageFailed, match="DeadlineExceeded"):
        follow(job, server, launcher=TrainJob(after_failure=policy))
    assert len(server.made("DELETE")) == (policy == "delete")
