from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from components.runtime.metric_spool import MetricSpool
from components.runtime.tracking import StageRun, Tracker


@pytest.fixture
def run(tracker: Tracker) -> StageRun:
    return tracker.stage("pretrain", key="spool")


def steps(run: StageRun) -> list[int]:
    return [point.step for point in run.client.get_metric_history(run.run_id, "loss")]


def spool(path: Path, run: StageRun, first_step: int) -> MetricSpool:
    return MetricSpool(path, run, first_step=first_step, marker="loss")


def test_a_restart_leaves_no_step_out_and_sends_none_twice(tmp_path: Path, run: StageRun) -> None:
    first = spool(tmp_path / "m.jsonl", run, 0)
    for step in range(8):
        first.add(step, {"loss": float(step)})
    assert first.flush()
    first.add(8, {"loss": 8.0})  # never sent: the process dies here
    first._file.flush()
    again = spool(tmp_path / "m.jsonl", run, 5)  # the checkpoint is older than what was sent
    for step in range(5, 12):
        again.add(step, {"loss": float(step)})
    assert again.close()
    assert steps(run) == list(range(12))


def test_what_was_written_but_not_sent_is_sent_after_a_restart(
    tmp_path: Path, run: StageRun
) -> None:
    first = spool(tmp_path / "m.jsonl", run, 0)
    for step in range(4):
        first.add(step, {"loss": 0.0})
    first._file.write('[4, {"lo')  # torn by the kill
    first._file.flush()
    assert spool(tmp_path / "m.jsonl", run, 4).close()
    assert steps(run) == [0, 1, 2, 3]


def test_a_rewind_replaces_rows_on_disk_and_sends_none_twice(tmp_path: Path, run: StageRun) -> None:
    rows = spool(tmp_path / "m.jsonl", run, 0)
    for step in range(4):
        rows.add(step, {"loss": 0.0})
    assert rows.flush()
    rows.rewind(2)
    for step in range(2, 6):
        rows.add(step, {"loss": 1.0})
    assert rows.close()
    kept = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert kept == [[s, {"loss": float(s > 1)}] for s in range(6)]
    assert steps(run) == list(range(6))


def test_an_unreachable_server_does_not_stop_the_training(tmp_path: Path, run: StageRun) -> None:
    class Down:
        run_id = run.run_id
        is_down = True

        def last_step(self, _: str) -> int:
            return -1

        def log_rows(self, rows: list[tuple[int, dict[str, float]]]) -> None:
            if self.is_down:
                raise MlflowException("down")
            run.log_rows(rows)

    server = Down()
    kept = MetricSpool(tmp_path / "m.jsonl", server, first_step=0, marker="loss")  # type: ignore[arg-type]
    kept.add(0, {"loss": 1.0})
    assert not kept.flush()
    kept.add(1, {"loss": 2.0})
    server.is_down = False
    assert kept.close()
    assert steps(run) == [0, 1]
    assert kept.failures == 1
