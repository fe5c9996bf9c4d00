"""job: files by which launcher and ranks hand over a job and its result, on a disk or in a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.ranks.job import remove_earlier_result
from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.job import Job, Result, read_result, report_uris, write_result

RESULT = Result(
    is_finished=True, step=3, final_losses={"total": 1.5}, images_per_second=2.0, teacher_sha256="a"
)


@pytest.fixture(params=["disk", "store"])
def job(
    request: pytest.FixtureRequest, s3: str, stage: TrainStage, context: RunContext, tmp_path: Path
) -> Job:
    workdir = str(tmp_path) if request.param == "disk" else "s3://pile/run"
    return Job(
        stage_name="finetune",
        stage=stage,
        context=context.model_copy(update={"workdir": workdir}),
        directory=f"{workdir}/stage",
        shards="/shards",
        mlflow_run_id="1",
    )


def test_a_job_survives_its_file(job: Job) -> None:
    job.write()
    assert Job.read(job.uri) == job
    assert {path.parent for path in (job.checkpoints, job.teacher, job.metrics)} == {job.root}


def test_reports_have_a_uri_for_all_nodes(job: Job) -> None:
    uris = report_uris(job)
    assert uris[job.metrics] == f"{job.directory}/metrics.jsonl"
    assert uris[job.progress] == f"{job.context.workdir}/progress/run/finetune.json"


def test_a_result_tells_how_far_a_training_came(job: Job) -> None:
    assert (read_result(job), job.is_finished(), job.progress_description()) == (
        None,
        False,
        "before any step",
    )
    write_result(job, RESULT)
    assert read_result(job) == RESULT
    assert job.is_finished()
    write_result(job, RESULT.model_copy(update={"is_finished": False}))
    assert not job.is_finished()
    assert job.progress_description() == "after step 3, with a checkpoint"
    remove_earlier_result(job.directory)
    assert read_result(job) is None
