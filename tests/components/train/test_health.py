"""health: one file that holds all figures, and components that outlive a restart."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.metric_rows import MetricRow
from components.runtime.tracking import StageRun
from components.train.config import TrainStage
from components.train.health import HealthPage, Section, loss_panel, page_of
from components.train.job import Job
from components.train.metrics import metrics_of
from dinov2_core.evaluation.preprocessing import Preprocessing
from tests.components.train.test_metrics import report

PREPROCESSING = Preprocessing(size_pixels=16, mean=(0.5,) * 3, standard_deviation=(0.2,) * 3)
IMAGES = np.zeros((2, 16, 16, 3), dtype=np.uint8)


def test_every_recorded_loss_term_has_a_curve() -> None:
    panel = loss_panel(["loss/total", "loss/dino_local", "teacher/entropy", "loss/kde"])
    assert panel.curves == {
        "loss/total": "total", "loss/dino_local": "dino local", "loss/kde": "kde",
    }  # fmt: skip


class Uploads:
    """Names of what was to be logged."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, log: Callable[[StageRun], None]) -> None:
        self.names.append(name)


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    job = Job(
        stage_name="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id="absent",
    )
    job.root.mkdir()
    rows = [MetricRow.made_now(step, metrics_of(report())) for step in range(6)]
    job.metrics.write_bytes(b"".join(row.line for row in rows))
    return job


def refresh(page: HealthPage, step: int, *, uploads: Uploads) -> None:
    tokens = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(step))
    page.refresh(upload=uploads, num_steps_done=step, patch_tokens=tokens, warnings=("rank < 2",))


@pytest.fixture
def page(job: Job) -> HealthPage:
    return HealthPage(job, images=IMAGES, preprocessing=PREPROCESSING)


def test_the_page_holds_every_figure(job: Job, page: HealthPage) -> None:
    uploads = Uploads()
    refresh(page, 6, uploads=uploads)
    text = (job.health / "health.html").read_text(encoding="utf-8")
    figures = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]+)", text)]
    names = ("curves", "crops", "patch_components")
    assert figures == [(job.health / f"{name}.png").read_bytes() for name in names]
    assert all(figure.startswith(b"\x89PNG") for figure in figures)
    assert uploads.names == [*(f"health_{name}.png" for name in names), "health.html"]
    assert "rank &lt; 2" in text
    assert "6 of 60" in text
    assert "<dt>loss</dt><dd>1.000</dd>" in text
    assert "http" not in text
    refresh(page, 7, uploads=uploads)
    assert len(uploads.names) == 4, "not so soon"


def test_components_of_earlier_steps_stay_and_later_ones_go_but_the_end_is_always_drawn(
    job: Job, page: HealthPage
) -> None:
    job.health.mkdir()
    for step in (2, 6, 90):  # the run went back
        np.save(job.health / f"components_{step:08d}.npy", np.ones((2, 4, 4, 3), dtype=np.float32))
    page._not_before = time.monotonic() + 1000
    refresh(page, 60, uploads=Uploads())
    kept = sorted(path.name for path in job.health.glob("*.npy"))
    assert kept == [f"components_000000{step}.npy" for step in ("02", "06", "60")]


def test_a_page_without_warnings_has_no_box() -> None:
    section = Section(name="n", title="T", explanation="E", png=b"png")
    page = page_of(title="a < b", facts={"step": "1"}, warnings=(), sections=(section,))
    assert 'class="warnings"' not in page
    assert "a &lt; b" in page
