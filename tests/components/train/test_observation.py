"""observation: the teacher is measured as evaluation would, and signs of collapse are told."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.train.config import Probe, TrainStage
from components.train.job import Job
from components.train.observation import Collapsed, Observer
from dinov2_core.config.guards import CollapseWatch, Guards
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.evaluation.collapse import effective_rank
from dinov2_core.evaluation.preprocessing import normalise
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.step_report import StepReport
from tests.components.train.test_metrics import report as any_report

WATCH = CollapseWatch(
    every_steps=2, grace_steps=0, num_images=12, min_effective_rank=0.0, min_prototype_usage=0.0
)


def report() -> StepReport:
    """A step of a healthy teacher."""
    report = any_report()
    return replace(report, losses=report.losses | {"teacher_entropy": 2.0})


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark images, which any backbone tells apart; beside it one with wrong labels."""
    path = tmp_path_factory.mktemp("labelled") / "set.parquet"
    images = []
    for i in range(20):
        buffer = io.BytesIO()
        Image.fromarray(np.full((20, 20, 3), 20 + 200 * (i % 2), dtype=np.uint8)).save(
            buffer, "PNG"
        )
        images.append(buffer.getvalue())
    for shift, name in enumerate(("set.parquet", "wrong.parquet")):
        labels = [(i + shift) % 2 for i in range(20)]
        pq.write_table(pa.table({"image": images, "label": labels}), path.with_name(name))
    return path


class World:
    """A run and its observer under some settings."""

    def __init__(self, stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks):
        shards, context, folder = place
        self.job = Job(
            phase="pretrain",
            stage=stage,
            context=context,
            directory=str(folder),
            shards=shards,
            mlflow_run_id="absent",
        )
        self.run = TrainingRun(stage.learning, ranks=ranks, checkpoints=self.job.checkpoints)
        self.observer = Observer(self.job, run=self.run, ranks=ranks)


@pytest.fixture
def place(
    dataset: DatasetManifest, context: RunContext, tmp_path: Path
) -> tuple[str, RunContext, Path]:
    return dataset.shards_uri, context, tmp_path


def watched(stage: TrainStage, watch: CollapseWatch, probe: Probe | None = None) -> TrainStage:
    learning = stage.learning.model_copy(update={"guards": Guards(collapse=watch)})
    return stage.model_copy(update={"learning": learning, "probe": probe})


def test_nothing_is_measured_between_the_steps_asked_for(
    stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks, labelled: Path
) -> None:
    probe = Probe(train=str(labelled), every_steps=4)
    world = World(watched(stage, WATCH, probe), place, ranks)
    seen = [world.observer(replace(report(), step=step)) for step in range(4)]
    names = [set(o.metrics) for o in seen]
    rank = {"teacher/effective_rank"}
    assert names == [set(), rank, set(), rank | {"probe/knn_top1"}]
    assert seen[3].metrics["probe/knn_top1"] == 1.0


def test_the_effective_rank_is_that_of_the_fixed_images(
    stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks
) -> None:
    world = World(watched(stage, WATCH.model_copy(update={"num_images": 6})), place, ranks)
    measured = world.observer(replace(report(), step=1)).metrics["teacher/effective_rank"]
    images = normalise(world.observer.pictured, preprocessing=world.observer.preprocessing)
    expected = effective_rank(world.run.teacher_features(images).cls.float())
    assert measured == pytest.approx(expected, rel=1e-5)
    assert world.observer.patches_of_pictured().shape == (6, 16, 32)


def test_a_crossed_threshold_warns_or_stops(
    stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks, labelled: Path
) -> None:
    wrong = str(labelled.with_name("wrong.parquet"))
    probe = Probe(train=str(labelled), test=wrong, every_steps=2, min_top1=0.5)
    strict = WATCH.model_copy(update={"min_effective_rank": 100.0})
    world = World(watched(stage, strict, probe), place, ranks)
    signs = world.observer(replace(report(), step=1)).signs
    assert [sign.split()[0] for sign in signs] == ["effective_rank", "knn_top1"]
    assert "knn_top1 0 is less than 0.5 (probe.min_top1)" in signs
    stopping = watched(stage, strict.model_copy(update={"action": "stop"}))
    with pytest.raises(Collapsed, match=r"step 1: effective_rank .* is less than 100 \(guards"):
        World(stopping, place, ranks).observer(replace(report(), step=1))


def test_a_skipped_step_says_nothing_of_collapse(
    stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks
) -> None:
    strict = WATCH.model_copy(update={"min_prototype_usage": 1.0})
    observer = World(watched(stage, strict), place, ranks).observer
    whole = report()
    low = replace(whole, step=2, losses=whole.losses | {"prototype_usage": 0.1})
    assert observer(low).signs
    assert not observer(replace(low, guards=replace(whole.guards, is_skipped=True))).signs


def test_too_few_labelled_images_are_refused(
    stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks, tmp_path: Path
) -> None:
    path = tmp_path / "one.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(ValueError, match="has 1 images, of which one in 5 is held out"):
        World(watched(stage, WATCH, Probe(train=str(path))), place, ranks)


def test_looking_changes_nothing(
    stage: TrainStage, place: tuple[str, RunContext, Path], ranks: Ranks
) -> None:
    world = World(watched(stage, WATCH), place, ranks)
    before = whole(world.run)
    world.observer(replace(report(), step=1))
    after = whole(world.run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def whole(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Copies of everything that a checkpoint holds."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in run._state().items()
    }
