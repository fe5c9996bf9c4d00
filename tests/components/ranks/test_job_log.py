from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.ranks.job_log import JobLog
from components.runtime.progress import Reporter
from tests.k8s.api_server import ApiServer, api_server

TRAINER = {"jobset.sigs.k8s.io/jobset-name": "j", "batch.kubernetes.io/job-completion-index": "0"}


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


def log_of(server: ApiServer, path: Path | None = None) -> JobLog:
    report = Reporter(path, stage="pretrain")
    return JobLog(server.cluster(), job="j", report=report)


def test_lines_of_the_first_node_are_logged_once(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    others = {**TRAINER, list(TRAINER)[1]: "1"}
    add_pod(server, "other", others, created="2")
    add_pod(server, "first", TRAINER)
    server.logs = {"other": ["2026-01-01T00:00:00Z not mine"]}
    log = log_of(server)
    log.catch_up()
    server.logs["first"] = ["2026-01-01T00:00:01Z one", "2026-01-01T00:00:01.2Z two"]
    log.catch_up()
    server.logs["first"].append("2026-01-01T00:00:01.25Z three")
    log.catch_up()
    assert caplog.messages == ["one", "two", "three"]
    assert log.tail() == ["  one", "  two", "  three"]


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
    assert log.tail() == []


def test_why_pods_do_not_run_is_logged_once(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    add_pod(server, "first", TRAINER)
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    server.pods[0]["status"] = {"conditions": [unplaced]}
    log = log_of(server)
    for _ in range(2):
        log.catch_up()
    assert caplog.messages == ["pod first: Unschedulable"]


def test_a_log_that_must_not_be_read_is_warned_of_once_with_what_to_grant(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    add_pod(server, "first", TRAINER)
    server.logs["first"] = ["2026-01-01T00:00:01Z one"]
    server.forbidden.add("pods/log")
    log = log_of(server)
    for _ in range(3):
        log.catch_up()
    (warning,) = caplog.messages
    assert warning.startswith("the log of j cannot be shown: cannot read the log of first")
    assert "give the step's service account the launcher's Role" in warning
    server.forbidden.clear()
    log.catch_up()
    assert caplog.messages[1:] == ["one"]


def test_a_container_that_waits_has_no_log_and_no_warning(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    add_pod(server, "first", TRAINER)
    log_of(server).catch_up()
    assert caplog.messages == []


def test_pods_and_events_that_must_not_be_read_end_nothing(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.forbidden.add("GET")
    log = log_of(server)
    log.catch_up()
    assert log.tail() == []
    assert len(caplog.messages) == 2  # pods and events, each once


def test_an_api_server_that_is_away_ends_nothing(server: ApiServer) -> None:
    server.faults.extend([(503, {})] * 5)
    log_of(server).catch_up()
