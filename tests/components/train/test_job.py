"""job: what launcher and ranks leave for each other."""

from __future__ import annotations

import json
from pathlib import Path

from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.job import (
    Job,
    first_failure,
    forget_outcome,
    last_rows,
    result_file,
    write_failure,
)


def test_a_job_survives_its_file(stage: TrainStage, context: RunContext) -> None:
    job = Job(
        phase="finetune",
        stage=stage,
        context=context,
        directory="/stage",
        shards="/shards",
        mlflow_run_id="1",
    )
    assert Job.model_validate_json(job.model_dump_json()) == job
    places = (job.checkpoints, job.teacher, job.metrics, job.file)
    assert {place.parent for place in places} == {Path("/stage")}


def test_the_failure_to_tell_can_be_fixed_or_came_first(tmp_path: Path) -> None:
    assert first_failure(tmp_path) is None
    write_failure(tmp_path, rank=1, error=RuntimeError("no peer"), can_be_fixed=False)
    write_failure(tmp_path, rank=0, error=RuntimeError("no peer either"), can_be_fixed=False)
    failure = first_failure(tmp_path)
    assert failure is not None
    assert (failure.rank, failure.message) == (1, "RuntimeError: no peer")
    write_failure(tmp_path, rank=2, error=ValueError("batch too large"), can_be_fixed=True)
    failure = first_failure(tmp_path)
    assert failure is not None
    assert (failure.rank, failure.message) == (2, "batch too large")


def test_an_earlier_outcome_is_forgotten(tmp_path: Path) -> None:
    forget_outcome(tmp_path)
    write_failure(tmp_path, rank=0, error=ValueError("x"), can_be_fixed=True)
    result_file(tmp_path).write_text("{}")
    forget_outcome(tmp_path)
    assert first_failure(tmp_path) is None
    assert not result_file(tmp_path).exists()


def test_last_rows_are_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps([step, {"loss": step}]) + "\n" for step in range(5)))
    assert last_rows(path, 2) == [{"loss": 3}, {"loss": 4}]
    assert len(last_rows(path, 9)) == 5
