"""Fixtures: a data set of small images and the flags of a training stage on it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.train.config import Topology, TrainStage
from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.execution import Checkpoints
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective
from dinov2_core.config.training import Crops, Optimization, TrainingConfig
from dinov2_core.data.shards import ShardWriter

HEAD = Head(num_prototypes=64, bottleneck_dim=16, hidden_dim=32)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetManifest:
    directory = tmp_path_factory.mktemp("dataset") / "shards"
    rng = np.random.default_rng(0)
    with ShardWriter(directory, target_size_bytes=4000) as writer:
        for _ in range(16):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=20, height=20)
    return DatasetManifest(
        uri=str(directory),
        sha256="0" * 64,
        config_sha256="1" * 64,
        num_images=16,
        num_kept=16,
        reasons={},
        table_uri="",
        shards_uri=str(directory),
        num_shards=1,
        size_bytes=1,
    )


@pytest.fixture(scope="session")
def stage() -> TrainStage:
    learning = TrainingConfig(
        backbone=Backbone(
            architecture=Dimensions(embed_dim=32, depth=2, num_heads=2), patch_size_pixels=4
        ),
        crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8, num_local_crops=2),
        dino=DinoObjective(head=HEAD),
        ibot=IbotObjective(head=HEAD),
        optimization=Optimization(
            num_steps=60, warmup_steps=1, global_batch_size=8, freeze_prototypes_steps=1
        ),
        precision="fp32",
        checkpoints=Checkpoints(every_steps=5, keep_last=2),
    )
    topology = Topology(threads_per_process=1, loader_threads=1)
    return TrainStage(learning=learning, topology=topology)


Flags = Callable[[TrainStage, DatasetManifest], list[str]]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without experiments; making its tables takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def new_context(store: Path, directory: Path) -> RunContext:
    """A run with a work directory and a store of its own."""
    workdir = directory / "work"
    workdir.mkdir()
    shutil.copy(store, workdir / "mlflow.db")
    return RunContext(workdir=str(workdir), run_id="run", run_name="test")


@pytest.fixture
def context(store: Path, tmp_path: Path) -> RunContext:
    return new_context(store, tmp_path)


def flags_of(context: RunContext, stage: TrainStage, dataset: DatasetManifest) -> list[str]:
    """Flags of a training stage, for which the data set's manifest is written."""
    path = context.root.with_name("dataset.json")
    dataset.write(path)
    return [
        "--config",
        stage.model_dump_json(),
        "--context",
        context.model_dump_json(),
        "--dataset",
        str(path),
    ]


@pytest.fixture
def flags(context: RunContext) -> Flags:
    return partial(flags_of, context)
