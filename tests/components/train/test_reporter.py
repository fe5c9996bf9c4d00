"""reporter: rows as often as asked and at every event; a run that goes back leaves new rows only."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.progress import Progress
from components.runtime.tracking import StageRun, Tracker
from components.train.config import TrainStage
from components.train.job import Job
from components.train.reporter import TrainingReporter
from dinov2_core.evaluation.preprocessing import Preprocessing
from dinov2_core.training.step_report import StepReport
from dinov2_core.training.teacher_monitor import Measurement
from tests.components.train.test_metrics import report

NOTHING = Measurement(metrics={}, warnings=())
RANK = {"teacher/effective_rank": 1.5}


class Monitor:
    """What a reporter needs of a teacher's monitor."""

    preprocessing = Preprocessing(size_pixels=16, mean=(0.5,) * 3, standard_deviation=(0.2,) * 3)
    displayed_images = np.zeros((2, 16, 16, 3), dtype=np.uint8)


MONITOR: Any = Monitor()


def patch_tokens() -> Tensor:
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(context: RunContext) -> StageRun:
    return Tracker(context).stage("pretrain", key="key")


@pytest.fixture
def job(
    stage: TrainStage, dataset: DatasetManifest, context: RunContext, run: StageRun, tmp_path: Path
) -> Job:
    return Job(
        stage_name="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id=run.run_id,
    )


def record(
    reporter: TrainingReporter, report: StepReport, measurement: Measurement = NOTHING
) -> None:
    reporter.end_profile()
    tokens = patch_tokens() if report.writes_checkpoint else None
    reporter.record(report, measurement=measurement, patch_tokens=tokens)


def skipped(report: StepReport) -> StepReport:
    return replace(report, guards=replace(report.guards, is_skipped=True))


def rows(job: Job) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    steps = [step for step, _, _ in lines]
    assert steps == sorted(set(steps))
    return {step: values for step, values, _ in lines}


def test_a_training_leaves_rows_page_trace_and_artifacts(
    job: Job, run: StageRun, caplog: pytest.LogCaptureFixture
) -> None:
    context = job.context.model_copy(update={"profile_steps": 1})
    job = job.model_copy(update={"context": context})
    job.root.mkdir()
    job.weights_report.write_text("w.pth: 3 loaded\n\nloaded: 3\n", encoding="utf-8")
    plain = report()
    low = Measurement(metrics=RANK, warnings=("effective_rank 1.5 is less",))
    with TrainingReporter(job, monitor=MONITOR, first_step=0) as reporter:
        for step in range(3):
            record(reporter, replace(plain, step=step), low)
        record(reporter, replace(skipped(plain), step=3))
        record(reporter, replace(plain, step=2, losses=plain.losses | {"total": 9.0}))
        record(reporter, replace(plain, step=3, writes_checkpoint=True))
    kept = rows(job)
    assert set(kept) == {0, 1, 2, 3}
    assert kept[2]["loss/total"] == 9.0
    assert kept[0]["teacher/effective_rank"] == 1.5
    paths = {item.path for item in run.client.list_artifacts(run.run_id)}
    assert paths == {"health.html", "figures", "profile", "starting_weights.txt"}
    figures = {item.path for item in run.client.list_artifacts(run.run_id, "figures")}
    names = ("curves", "crops", "patch_components")
    assert figures == {f"figures/health_{name}.png" for name in names}
    found = run.client.get_run(run.run_id).data
    assert found.tags["dinopipe.starting_weights"] == "w.pth: 3 loaded"
    assert found.metrics["teacher/effective_rank"] == 1.5
    assert "since step 0: effective_rank 1.5" in (job.health / "health.html").read_text()
    assert caplog.text.count("the features may be collapsing") == 1
    progress = context.progress_directory / "pretrain.json"
    assert Progress.model_validate_json(progress.read_text()).task == "training"


def test_rows_are_as_far_apart_as_asked_but_for_events(job: Job) -> None:
    stage = job.stage.model_copy(update={"log_every_steps": 10})
    job = job.model_copy(update={"stage": stage})
    plain = report()
    with TrainingReporter(job, monitor=MONITOR, first_step=0) as reporter:
        for step in range(45):
            taken = replace(plain, step=step, losses=plain.losses | {"total": float(step)})
            match step:
                case 13:
                    record(reporter, skipped(taken))
                case 17:
                    record(reporter, taken, Measurement(metrics=RANK, warnings=()))
                case 24:
                    reporter.end_profile()
                    saved = replace(taken, writes_checkpoint=True)
                    reporter.record(saved, measurement=NOTHING, patch_tokens=None)
                case 31 | 32:  # only the first of equal warnings is an event
                    low = Measurement(metrics={}, warnings=("prototype_usage 0 is less",))
                    record(reporter, taken, low)
                case _:
                    record(reporter, taken)
        record(reporter, replace(plain, step=42))  # after a return to a checkpoint
    kept = rows(job)
    assert sorted(kept) == [0, 10, 13, 17, 20, 24, 30, 31, 40, 42]
    assert kept[20]["loss/total"] == 20.0, "a row is of its own step"
    assert kept[17]["teacher/effective_rank"] == 1.5


def test_a_training_goes_on_and_ends_without_its_tracking_server(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    context = job.context.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    job = job.model_copy(update={"context": context})
    with TrainingReporter(job, monitor=MONITOR, first_step=0) as reporter:
        for step in range(3):
            record(reporter, replace(report(), step=step))
    assert set(rows(job)) == {0, 1, 2}
    assert caplog.text.count("sending to MLflow failed") == 1
    assert "does not answer" in caplog.text


def test_a_directory_that_cannot_be_written_ends_no_training(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = job.context.progress_directory
    progress.parent.mkdir(parents=True)
    progress.write_text("a file where a directory should be")
    with TrainingReporter(job, monitor=MONITOR, first_step=0) as reporter:
        moved = job.root.rename(tmp_path / "moved")
        for step in range(3):
            record(reporter, replace(report(), step=step))
            time.sleep(0.31)  # so long the progress rests
        reporter._background.flush()
        moved.rename(job.root)
    assert set(rows(job)) == {0, 1, 2}
    assert caplog.text.count("writing the progress failed: ") == 1
    assert caplog.text.count("writing metrics failed: FileNotFoundError") == 1
