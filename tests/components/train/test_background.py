"""background: rows are on disk when asked for, nothing waits for MLflow, no error stops it."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from components.runtime.metric_log import MetricLog
from components.runtime.metric_rows import last_rows
from components.train.background import BackgroundWork
from components.train.job import MARKER


@dataclass
class SlowServer:
    """MLflow as a run and its client, which answer when they may."""

    run_id: str = "run"
    tracking_uri: str = "http://me:hunter2@host"
    may_answer: threading.Event = field(default_factory=threading.Event)
    is_down: bool = False
    steps: list[int] = field(default_factory=list)
    num_requests: int = 0

    @property
    def client(self) -> SlowServer:
        return self

    def last_step(self, metric: str) -> int:
        assert metric == MARKER
        return -1

    def log_batch(self, run_id: str, *, metrics: list[Any]) -> None:
        self.num_requests += 1
        assert self.may_answer.wait(timeout=20)
        if self.is_down:
            raise MlflowException("http://me:hunter2@host is down")
        self.steps += [metric.step for metric in metrics]


@pytest.fixture
def server() -> SlowServer:
    return SlowServer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stage" / "metrics.jsonl"


@pytest.fixture
def log(path: Path) -> MetricLog:
    return MetricLog(path, first_step=0, marker=MARKER)


def background(
    log: MetricLog, open_run: Callable[[], Any], *, close_seconds: float = 20.0
) -> BackgroundWork:
    return BackgroundWork(
        log, open_run=open_run, interval_seconds=0.05, close_seconds=close_seconds
    )


@pytest.fixture
def work(log: MetricLog, server: SlowServer) -> Iterator[BackgroundWork]:
    with background(log, lambda: server) as work:
        yield work
        server.may_answer.set()


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def add(log: MetricLog, *steps: int) -> None:
    for step in steps:
        log.add(step, {MARKER: float(step)})


def test_a_hanging_server_costs_a_checkpoint_nothing(
    work: BackgroundWork, log: MetricLog, server: SlowServer, path: Path
) -> None:
    add(log, 0)
    wait_for(lambda: server.num_requests == 1)  # and hangs from here on
    started = time.monotonic()
    for step in range(1, 50):
        add(log, step)
        work.flush()
    assert time.monotonic() - started < 5
    assert len(last_rows(path, 99)) == 50
    server.may_answer.set()
    wait_for(lambda: len(server.steps) == 50)
    assert server.steps == list(range(50))


def test_a_server_that_comes_back_gets_everything_and_is_warned_of_once(
    log: MetricLog, server: SlowServer, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.may_answer.set()
    server.is_down = True
    with background(log, lambda: server) as work:
        add(log, 0, 1)
        work.upload("page", lambda _: server.steps.append(99))
        wait_for(lambda: server.num_requests >= 3)
        server.is_down = False
    assert server.steps == [0, 1, 99]
    assert caplog.text.count("sending to MLflow failed: MLflow at http://host") == 1
    assert "hunter2" not in caplog.text
    assert caplog.text.count("sending to MLflow works again") == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_artifact_that_cannot_be_logged_holds_up_nothing(
    work: BackgroundWork, log: MetricLog, server: SlowServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.may_answer.set()
    done = threading.Event()
    work.upload("absent", lambda _: Path("/absent").read_text())  # type: ignore[arg-type,return-value]
    work.upload("page", lambda _: done.set())
    assert done.wait(timeout=20)
    add(log, 0)
    wait_for(lambda: server.steps == [0])
    assert caplog.text.count("sending to MLflow failed: FileNotFoundError") == 1


def test_an_absent_server_is_tried_less_and_less_often(
    log: MetricLog, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def refuse() -> Any:
        attempts.append(time.monotonic())
        raise MlflowException("refused")

    with background(log, refuse) as work:
        add(log, 0)
        wait_for(lambda: len(attempts) == 4)
        work.flush()
    pauses = [b - a for a, b in pairwise(attempts)]
    assert pauses[1] > 0.09
    assert pauses[2] > 0.19
    assert len(attempts) == 5, "once more at the end"


def test_rows_that_no_server_took_are_left_for_the_next_run(
    log: MetricLog, server: SlowServer, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.may_answer.set()
    server.is_down = True
    with background(log, lambda: server):
        add(log, 0, 1)
    assert last_rows(path, 5) == [{MARKER: 0.0}, {MARKER: 1.0}]
    assert (path.parent / "metrics.jsonl.unsent").exists()
    assert f"the last metrics are not in MLflow; {path} keeps them" in caplog.text


def test_a_server_that_hangs_at_the_end_is_given_up(
    log: MetricLog, server: SlowServer, path: Path
) -> None:
    started = time.monotonic()
    with background(log, lambda: server, close_seconds=0.3):
        add(log, 0)
    assert time.monotonic() - started < 5
    assert (path.parent / "metrics.jsonl.unsent").exists()
    server.may_answer.set()


def test_a_vanished_directory_is_said_once_and_nothing_is_lost(
    work: BackgroundWork,
    log: MetricLog,
    server: SlowServer,
    path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.may_answer.set()
    add(log, 0)
    wait_for(lambda: server.steps == [0])
    moved = path.parent.rename(path.parent.with_name("moved"))
    add(log, 1)
    started = time.monotonic()
    for _ in range(5):
        work.flush()
        time.sleep(0.06)
    assert time.monotonic() - started < 5
    assert caplog.text.count("writing metrics failed: FileNotFoundError") == 1
    assert f"{path.parent} cannot be found" in caplog.text
    moved.rename(path.parent)
    add(log, 2)
    wait_for(lambda: server.steps == [0, 1, 2])
    assert len(last_rows(path, 9)) == 3


def test_a_full_disk_is_told_with_its_free_space(
    work: BackgroundWork, log: MetricLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.symlink_to("/dev/full")
    add(log, 0)
    work.flush()
    assert "No space left on device" in caplog.text
    assert re.search(rf"{path.parent} has [\d,]+ MiB of free space", caplog.text)
    path.unlink()


def test_a_task_that_fails_stops_nothing(
    work: BackgroundWork,
    log: MetricLog,
    server: SlowServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.may_answer.set()
    done = threading.Event()
    work.run(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    work.run(done.set)
    assert done.wait(timeout=20)
    assert "the health page failed: ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text
    add(log, 0)
    wait_for(lambda: server.steps == [0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_noticed_at_once(
    work: BackgroundWork, log: MetricLog, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def end_thread() -> None:
        raise SystemExit

    work.run(end_thread)
    wait_for(lambda: not work._thread.is_alive())
    add(log, 0)
    started = time.monotonic()
    for _ in range(3):
        work.flush()
    assert time.monotonic() - started < 5
    assert caplog.text.count("the thread that sends to MLflow has ended") == 1
    assert last_rows(path, 5) == [{MARKER: 0.0}]


def test_a_rewind_removes_later_rows(work: BackgroundWork, log: MetricLog, path: Path) -> None:
    add(log, 0, 1, 2)
    work.flush()
    work.rewind(1)
    add(log, 1)
    work.flush()
    assert last_rows(path, 9) == [{MARKER: 0.0}, {MARKER: 1.0}]
