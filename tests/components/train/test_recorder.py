"""recorder: rows are on disk when asked for, and no step waits for the server."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from components.runtime.context import RunContext
from components.runtime.metric_spool import MetricSpool
from components.runtime.tracking import Tracker
from components.train.config import TrainStage
from components.train.job import Job, last_rows
from components.train.recorder import MARKER, MetricRecorder, open_recorder


class SlowRun:
    """A run whose server answers when it is let to."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.may_answer = threading.Event()
        self.is_down = False

    def last_step(self, metric: str) -> int:
        assert metric == MARKER
        return -1

    def log_rows(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        rows = list(rows)
        assert self.may_answer.wait(timeout=10)
        if self.is_down:
            raise MlflowException("down")
        self.rows += rows


def recorder_of(path: Path, run: SlowRun) -> MetricRecorder:
    spool = MetricSpool(path, run, first_step=0, marker=MARKER)  # type: ignore[arg-type]
    return MetricRecorder(spool, run)  # type: ignore[arg-type]


def test_rows_added_while_the_server_is_slow_are_all_sent(tmp_path: Path) -> None:
    run = SlowRun()
    with recorder_of(tmp_path / "metrics.jsonl", run) as recorder:
        waiting = threading.Thread(target=recorder.flush)
        recorder.add(0, {MARKER: 0.0})
        waiting.start()
        for step in range(1, 50):
            recorder.add(step, {MARKER: float(step)})
        run.may_answer.set()
        recorder.flush()
        assert Counter(step for step, _ in run.rows) == Counter(range(50))
        waiting.join()


def test_a_flush_puts_rows_on_disk_even_without_a_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, path = SlowRun(), tmp_path / "metrics.jsonl"
    run.may_answer.set()
    run.is_down = True
    with recorder_of(path, run) as recorder:
        recorder.add(0, {MARKER: 1.5})
        recorder.flush()
        assert last_rows(path, 5) == [{MARKER: 1.5}]
        run.is_down = False
        recorder.add(1, {MARKER: 2.5})
    assert [step for step, _ in run.rows] == [0, 1]
    assert "metrics wait on disk" in caplog.text


def test_a_recorder_goes_on_in_the_run_of_the_job(
    stage: TrainStage, context: RunContext, tmp_path: Path
) -> None:
    run = Tracker(context).stage("pretrain", key="key")
    job = Job(
        phase="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path),
        shards="",
        mlflow_run_id=run.run_id,
    )
    with open_recorder(job, first_step=0) as recorder:
        for step in range(5):
            recorder.add(step, {MARKER: float(step)})
    with open_recorder(job, first_step=3) as recorder:
        for step in range(3, 7):
            recorder.add(step, {MARKER: float(step)})
    history = run.client.get_metric_history(run.run_id, MARKER)
    assert Counter(point.step for point in history) == Counter(range(7))


def test_what_became_of_starting_weights_is_logged(
    stage: TrainStage, context: RunContext, tmp_path: Path
) -> None:
    run = Tracker(context).stage("pretrain", key="key")
    job = Job(
        phase="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path),
        shards="",
        mlflow_run_id=run.run_id,
    )
    job.starting_report.write_text("w.pth: 3 loaded\n\nloaded: 3\n", encoding="utf-8")
    with open_recorder(job, first_step=0):
        pass
    found = run.client.get_run(run.run_id)
    assert found.data.tags["dinopipe.starting_weights"] == "w.pth: 3 loaded"
    logged = run.client.list_artifacts(run.run_id)
    assert "starting_weights.txt" in [item.path for item in logged]


def test_a_run_that_goes_back_takes_its_later_rows_along(tmp_path: Path) -> None:
    run, path = SlowRun(), tmp_path / "metrics.jsonl"
    run.may_answer.set()
    with recorder_of(path, run) as recorder:
        for value in (1.0, 2.0):
            recorder.rewind(1)
            for step in range(int(value) - 1, 3):
                recorder.add(step, {MARKER: value})
            recorder.flush()
        assert last_rows(path, 9) == [{MARKER: 1.0}, {MARKER: 2.0}, {MARKER: 2.0}]
    assert [step for step, _ in run.rows] == [0, 1, 2]


def test_work_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, seen = SlowRun(), []
    run.may_answer.set()
    with recorder_of(tmp_path / "metrics.jsonl", run) as recorder:
        recorder.do(lambda _run: seen.append(1 / 0))
        recorder.do(seen.append)
        recorder.flush()
        assert seen == [run]
    assert "a report of the training was not written" in caplog.text
