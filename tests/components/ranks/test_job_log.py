from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.ranks.job_log import JobLog
from components.runtime.progress import Reporter
from k8s.job_kind import JobKind
from k8s.pytorchjob import PYTORCH_JOBS
from k8s.trainjob import TRAIN_JOBS
from tests.k8s.api_server import ApiServer, api_server

TRAINER = {"jobset.sigs.k8s.io/jobset-name": "j", "batch.kubernetes.io/job-completion-index": "0"}
OPERATOR = {"training.kubeflow.org/job-name": "j", "training.kubeflow.org/replica-type": "master"}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="components")


def add_pod(server: ApiServer, name: str, labels: dict[str, str], *, created: str = "1") -> None:
    metadata = {"name": name, "labels": labels, "creationTimestamp": created}
    server.pods.append({"metadata": metadata, "status": {}})


def log_of(server: ApiServer, path: Path | None = None, kind: JobKind = TRAIN_JOBS) -> JobLog:
    report = Reporter(path, stage="pretrain")
    return JobLog(server.cluster(), kind=kind, job="j", report=report)


@pytest.mark.parametrize(("kind", "labels"), [(TRAIN_JOBS, TRAINER), (PYTORCH_JOBS, OPERATOR)])
def test_lines_of_the_first_node_are_told_once(
    server: ApiServer, kind: JobKind, labels: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    others = {**labels, list(labels)[1]: "1"}
    add_pod(server, "other", others, created="2")
    add_pod(server, "first", labels)
    server.logs = {"other": ["2026-01-01T00:00:00Z not mine"]}
    log = log_of(server, kind=kind)
    log.catch_up()
    server.logs["first"] = ["2026-01-01T00:00:01Z one", "2026-01-01T00:00:01.2Z two"]
    log.catch_up()
    server.logs["first"].append("2026-01-01T00:00:01.25Z three")
    log.catch_up()
    assert caplog.messages == ["one", "two", "three"]
    assert log.last_words() == ["  one", "  two", "  three"]


def test_lines_of_one_time_are_told_apart(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    add_pod(server, "first", TRAINER)
    now, later = "2026-01-01T00:00:01Z", "2026-01-01T00:00:02Z"
    server.logs["first"] = [f"{now} one", f"{now} two"]
    log = log_of(server)
    log.catch_up()
    log.catch_up()
    server.logs["first"] += [f"{now} three", f"{later} four", f"{later} five"]
    log.catch_up()
    log.catch_up()
    assert caplog.messages == ["one", "two", "three", "four", "five"]


def test_the_log_of_a_restarted_node_goes_on(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    add_pod(server, "old", TRAINER)
    server.logs["old"] = ["2026-01-01T00:00:01Z before"]
    log = log_of(server)
    log.catch_up()
    add_pod(server, "new", TRAINER, created="2")
    server.logs["new"] = ["2026-01-01T00:00:09Z after"]
    log.catch_up()
    assert caplog.messages == ["before", "after"]


def test_progress_becomes_the_step_s_own(server: ApiServer, tmp_path: Path) -> None:
    add_pod(server, "first", TRAINER)
    server.logs["first"] = [
        "2026-01-01T00:00:01Z [pretrain] training · step 40/60 · loss 3.1 · 12 images/s"
    ]
    log = log_of(server, tmp_path / "progress.json")
    log.catch_up()
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert (progress["task"], progress["done"], progress["total"]) == ("training", 40, 60)
    assert log.last_words() == []


def test_why_pods_do_not_run_is_told_once(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    add_pod(server, "first", TRAINER)
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    server.pods[0]["status"] = {"conditions": [unplaced]}
    log = log_of(server)
    for _ in range(2):
        log.catch_up()
    assert caplog.messages == ["pod first: Unschedulable"]


def test_a_log_that_cannot_be_read_ends_nothing(server: ApiServer) -> None:
    server.forbidden.add("GET")
    log = log_of(server)
    log.catch_up()
    assert log.last_words() == []
