from __future__ import annotations

from pathlib import Path

import pytest

from components.ranks.exit_status import check_exit_status
from components.ranks.job import write_failure
from components.runtime.context import RunContext
from components.train.config import TrainStage
from components.train.job import Job, Result, write_result
from dinov2_core.errors import (
    ExitCode,
    SettingsError,
    StageFailed,
    Stopped,
    UserError,
    exit_code_of,
)

RESULT = Result(
    is_finished=True, step=60, final_losses={}, images_per_second=1.0, teacher_sha256="0" * 64
)


@pytest.fixture
def job(stage: TrainStage, tmp_path: Path) -> Job:
    return Job(
        stage_name="pretrain",
        stage=stage,
        context=RunContext(workdir=str(tmp_path), run_name="test"),
        directory=str(tmp_path / "stage"),
        shards="",
        mlflow_run_id="",
    )


def test_a_finished_job_is_no_trouble(job: Job) -> None:
    write_result(job, RESULT)
    check_exit_status(job, code=0)


def test_no_result_is_reported_with_the_exit_code(job: Job) -> None:
    with pytest.raises(StageFailed, match="the ranks ended with code 1 and no result"):
        check_exit_status(job, code=1)


def test_a_user_error_comes_before_all_others(job: Job) -> None:
    write_result(job, RESULT)
    write_failure(job.directory, rank=0, error=RuntimeError("hung up"))
    with pytest.raises(StageFailed, match=r"^rank 0 failed: RuntimeError: hung up$"):
        check_exit_status(job, code=1)
    write_failure(job.directory, rank=1, error=SettingsError("a smaller batch"))
    with pytest.raises(UserError, match=r"^a smaller batch$"):
        check_exit_status(job, code=1)


def test_stopped_ranks_can_go_on(job: Job) -> None:
    write_result(job, RESULT.model_copy(update={"is_finished": False, "step": 7}))
    with pytest.raises(Stopped) as stopped:
        check_exit_status(job, code=ExitCode.STOPPED)
    assert exit_code_of(stopped.value) == ExitCode.STOPPED
    assert str(stopped.value) == "stopped after step 7, with a checkpoint; start again to continue"


def test_ranks_that_were_stopped_before_they_began_can_go_on(job: Job) -> None:
    with pytest.raises(Stopped, match="^stopped before any step; start again to continue$"):
        check_exit_status(job, code=ExitCode.STOPPED)


def test_a_rank_that_was_killed_is_reported_even_if_the_others_were_stopped(job: Job) -> None:
    write_result(job, RESULT.model_copy(update={"is_finished": False, "step": 7}))
    with pytest.raises(StageFailed, match=r"one of them was killed \(out of memory\?\)"):
        check_exit_status(job, code=1)
