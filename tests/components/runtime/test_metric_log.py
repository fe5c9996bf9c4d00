"""metric_log: no step is lost or doubled, whatever disk, server and process do."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from components.runtime.metric_log import MetricLog, leave_note, send_unsent_rows
from components.runtime.metric_rows import last_rows
from components.runtime.tracking import StageRun, Tracker
from dinov2_core.errors import TrackingUnavailable


@pytest.fixture
def run(tracker: Tracker, request: pytest.FixtureRequest) -> StageRun:
    return tracker.stage("pretrain", key=request.node.name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(run: StageRun, metric: str = "loss") -> list[int]:
    return [point.step for point in run.client.get_metric_history(run.run_id, metric)]


def log_at(path: Path, first_step: int) -> MetricLog:
    return MetricLog(path, first_step=first_step, marker="loss")


def kept_steps(path: Path) -> list[int]:
    return [json.loads(line)[0] for line in path.read_text().splitlines()]


class FaultyClient:
    """A client between which and its server some requests or answers are lost."""

    def __init__(self, client: Any, faults: list[str]) -> None:
        self._client = client
        self._faults = faults

    def log_batch(self, *args: Any, **values: Any) -> None:
        fault = self._faults.pop(0) if self._faults else ""
        if fault != "request lost":
            self._client.log_batch(*args, **values)
        if fault:
            raise MlflowException(fault)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def behind(run: StageRun, *faults: str) -> StageRun:
    return replace(run, client=FaultyClient(run.client, list(faults)))  # type: ignore[arg-type]


@contextmanager
def no_space_beyond(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size, as on a full disk: what fits is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_restart_leaves_no_step_out_and_sends_none_twice(path: Path, run: StageRun) -> None:
    first = log_at(path, 0)
    for step in range(8):
        first.add(step, {"loss": float(step)})
    first.flush()
    first.send(run)
    first.add(8, {"loss": 8.0})
    first.flush()  # never sent: the process is killed here
    again = log_at(path, 5)  # the checkpoint is older than what was sent
    for step in range(5, 12):
        again.add(step, {"loss": float(step)})
    again.flush()
    again.send(run)
    assert steps(run) == list(range(12)) == kept_steps(path)


def test_what_was_written_but_not_sent_is_sent_after_a_restart(path: Path, run: StageRun) -> None:
    first = log_at(path, 0)
    for step in range(4):
        first.add(step, {"loss": 0.0})
    first.flush()
    with path.open("a") as file:
        file.write('[4, {"lo')  # torn by the kill
    log_at(path, 4).send(run)
    assert steps(run) == [0, 1, 2, 3] == kept_steps(path)


def test_a_rewind_replaces_rows_on_disk_and_sends_none_twice(path: Path, run: StageRun) -> None:
    log = log_at(path, 0)
    for step in range(4):
        log.add(step, {"loss": 0.0})
    log.flush()
    log.send(run)
    log.add(4, {"loss": 0.0})
    log.rewind(2)
    for step in range(2, 6):
        log.add(step, {"loss": 1.0})
    log.flush()
    log.send(run)
    assert last_rows(path, 9) == [{"loss": float(step > 1)} for step in range(6)]
    assert steps(run) == list(range(6))


def test_a_rewind_while_rows_are_sent_leaves_no_step_out(path: Path, run: StageRun) -> None:
    class Rewinding(FaultyClient):
        def log_batch(self, *args: Any, **values: Any) -> None:
            super().log_batch(*args, **values)
            log.rewind(1)
            for step in range(1, 6):
                log.add(step, {"loss": 1.0, "longer": 1.0})
            log.flush()

    log = log_at(path, 0)
    for step in range(3):
        log.add(step, {"loss": 0.0})
    log.flush()
    log.send(replace(run, client=Rewinding(run.client, [])))  # type: ignore[arg-type]
    log.send(run)
    assert steps(run) == list(range(6))
    assert not log.has_unsent_rows


@pytest.mark.parametrize("fault", ["request lost", "answer lost"])
def test_rows_whose_answer_was_lost_are_sent_again_without_doubles(
    path: Path, run: StageRun, fault: str
) -> None:
    log, faulty = log_at(path, 0), behind(run, fault, fault)
    for step in range(3):
        log.add(step, {"loss": float(step)})
    log.flush()
    for _ in range(2):
        with pytest.raises(TrackingUnavailable):
            log.send(faulty)
        assert log.has_unsent_rows
    log.add(3, {"loss": 3.0})
    log.flush()
    log.send(faulty)
    assert steps(run) == [0, 1, 2, 3]
    assert not log.has_unsent_rows


def test_a_kill_between_two_requests_leaves_whole_steps(path: Path, run: StageRun) -> None:
    names = ["loss", *(f"m{i}" for i in range(26))]
    log = log_at(path, 0)
    for step in range(40):  # 1080 metrics
        log.add(step, dict.fromkeys(names, float(step)))
    log.flush()
    with pytest.raises(TrackingUnavailable):
        log.send(behind(run, "", "request lost"))
    sent = steps(run)
    assert 0 < len(sent) < 40
    assert all(steps(run, name) == sent for name in names)
    log_at(path, 40).send(run)
    assert all(Counter(steps(run, name)) == Counter(range(40)) for name in names)


def test_a_step_that_the_server_has_in_part_is_completed(path: Path, run: StageRun) -> None:
    log = log_at(path, 0)
    for step in range(3):
        log.add(step, {"loss": 1.0, "rank": 2.0})
    log.flush()
    log.send(run)
    other = run.client.create_run(run.experiment_id).info.run_id
    half = replace(run, run_id=other)
    for step in range(2):
        (point,) = [p for p in run.client.get_metric_history(run.run_id, "loss") if p.step == step]
        run.client.log_batch(other, metrics=[point])
    run.client.log_batch(
        other, metrics=run.client.get_metric_history(run.run_id, "rank")[:1]
    )  # step 1 has no rank
    log_at(path, 3).send(half)
    assert steps(half) == [0, 1, 2]
    assert steps(half, "rank") == [0, 1, 2]


def test_rows_wait_for_space_on_the_disk_and_none_is_torn(path: Path, run: StageRun) -> None:
    log = log_at(path, 0)
    log.add(0, {"loss": 0.0})
    log.flush()
    for step in range(1, 6):
        log.add(step, {"loss": float(step)})
    with no_space_beyond(path.stat().st_size + 10), pytest.raises(OSError, match="No space|large"):
        log.flush()
    assert log.has_unsent_rows
    log.send(run)
    assert steps(run) == [0]
    log.flush()
    log.send(run)
    assert kept_steps(path) == steps(run) == list(range(6))


def test_rows_wait_for_a_directory_that_vanished(path: Path) -> None:
    log = log_at(path, 0)
    log.add(0, {"loss": 0.0})
    log.flush()
    moved = path.parent.rename(path.parent.with_name("moved"))
    log.add(1, {"loss": 1.0})
    with pytest.raises(FileNotFoundError):
        log.flush()
    moved.rename(path.parent)
    log.flush()
    assert kept_steps(path) == [0, 1]


def test_what_an_ended_training_could_not_send_is_sent_later(path: Path, run: StageRun) -> None:
    log = log_at(path, 0)
    for step in range(3):
        log.add(step, {"loss": 0.0})
    log.flush()
    leave_note(log)
    send_unsent_rows(str(path), run, marker="loss")
    assert steps(run) == [0, 1, 2]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]
    send_unsent_rows(str(path), behind(run, "no request is made"), marker="loss")


def test_rows_of_an_earlier_version_have_no_time(path: Path, run: StageRun) -> None:
    path.write_text('[0, {"loss": 1.0}]\n')
    log_at(path, 1).send(run)
    assert steps(run) == [0]
