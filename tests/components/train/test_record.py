"""record: every step leaves a row, a run that goes back leaves its new rows only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.progress import Progress
from components.runtime.tracking import Tracker
from components.train.config import TrainStage
from components.train.job import Job
from components.train.observation import Observation
from components.train.record import Record
from dinov2_core.evaluation.preprocessing import Preprocessing
from dinov2_core.training.step_report import StepReport
from tests.components.train.test_metrics import report


class Onlooker:
    """An observer that sees the same at every step."""

    preprocessing = Preprocessing(size_pixels=16, mean=(0.5,) * 3, standard_deviation=(0.2,) * 3)
    pictured = np.zeros((2, 16, 16, 3), dtype=np.uint8)

    def __call__(self, report: StepReport) -> Observation:
        return Observation(metrics={"teacher/effective_rank": 1.5}, signs=("effective_rank 1.5",))

    def patches_of_pictured(self) -> Tensor:
        return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))


def test_a_training_leaves_rows_page_and_trace(
    stage: TrainStage,
    dataset: DatasetManifest,
    context: RunContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = context.model_copy(update={"profile_steps": 1})
    run = Tracker(context).stage("pretrain", key="key")
    job = Job(
        phase="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path),
        shards=dataset.shards_uri,
        mlflow_run_id=run.run_id,
    )
    plain = report()
    lost = replace(plain, guards=replace(plain.guards, is_skipped=True))
    reports = [
        *(replace(plain, step=step) for step in range(3)),
        replace(lost, step=3),
        replace(plain, step=2, losses=plain.losses | {"total": 9.0}),
        replace(plain, step=3, writes_checkpoint=True),
    ]
    observer = Onlooker()
    with Record(job, observer=observer, first_step=0) as record:  # type: ignore[arg-type]
        record.take(iter(reports), observer=observer)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    assert rows[2][1]["loss/total"] == 9.0
    assert rows[0][1]["teacher/effective_rank"] == 1.5
    found = {item.path for item in run.client.list_artifacts(run.run_id)}
    assert {"health.html", "figures", "profile"} <= found
    assert "since step 0: effective_rank 1.5" in (job.health / "health.html").read_text()
    assert caplog.text.count("the features may be collapsing") == 1
    progress = context.progress_directory / "pretrain.json"
    assert Progress.model_validate_json(progress.read_text()).task == "training"
