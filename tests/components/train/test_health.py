"""health: one file that holds all figures, and components that outlive a restart."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.train.config import TrainStage
from components.train.health import HealthPage, Section, page_of, read_rows
from components.train.job import Job
from components.train.metrics import metrics_of
from dinov2_core.evaluation.preprocessing import Preprocessing
from tests.components.train.test_metrics import report

PREPROCESSING = Preprocessing(size_pixels=16, mean=(0.5,) * 3, standard_deviation=(0.2,) * 3)
PICTURED = np.zeros((2, 16, 16, 3), dtype=np.uint8)


class KeptRun:
    """A run that remembers what is logged."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def log_picture(self, name: str, png: bytes) -> None:
        assert png.startswith(b"\x89PNG")
        self.names.append(name)

    def log_file(self, path: Path, *, folder: str) -> None:
        assert path.exists()
        assert not folder
        self.names.append(path.name)


@pytest.fixture
def job(stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path) -> Job:
    job = Job(
        phase="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id="absent",
    )
    job.root.mkdir()
    rows = [(step, metrics_of(report())) for step in range(6)]
    job.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return job


def refresh(job: Job, step: int, *, run: KeptRun) -> None:
    page = HealthPage(job, pictured=PICTURED, preprocessing=PREPROCESSING)
    patches = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(step))
    page.refresh(run, num_steps_done=step, patches=patches, signs=("rank < 2",))  # type: ignore[arg-type]


def test_the_page_holds_every_figure(job: Job) -> None:
    run = KeptRun()
    refresh(job, 6, run=run)
    page = (job.health / "health.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]+)", page)]
    names = ("curves", "crops", "patch_components")
    assert pictures == [(job.health / f"{name}.png").read_bytes() for name in names]
    assert run.names == [*(f"health_{name}.png" for name in names), "health.html"]
    assert "rank &lt; 2" in page
    assert "6 of 60" in page
    assert "http" not in page


def test_components_of_earlier_steps_stay_and_later_ones_go(job: Job) -> None:
    job.health.mkdir()
    for step in (2, 6):  # the run went back after step 6
        np.save(job.health / f"components_{step:08d}.npy", np.ones((2, 4, 4, 3), dtype=np.float32))
    refresh(job, 4, run=KeptRun())
    kept = sorted(path.name for path in job.health.glob("*.npy"))
    assert kept == ["components_00000002.npy", "components_00000004.npy"]


def test_a_page_is_not_drawn_again_at_once_but_at_the_end(job: Job) -> None:
    run = KeptRun()
    page = HealthPage(job, pictured=PICTURED, preprocessing=PREPROCESSING)
    for step in (2, 4, 60):
        page.refresh(run, num_steps_done=step, patches=torch.randn(2, 16, 8), signs=())  # type: ignore[arg-type]
    assert run.names.count("health.html") == 2


def test_rows_lose_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('[0, {"a": NaN, "b": 1.0}]\n')
    assert read_rows(path) == [(0, {"b": 1.0})]


def test_a_page_without_signs_warns_of_nothing() -> None:
    section = Section(name="n", title="T", explanation="E", png=b"png")
    page = page_of(title="a < b", facts={"step": "1"}, signs=(), sections=(section,))
    assert 'class="signs"' not in page
    assert "a &lt; b" in page
