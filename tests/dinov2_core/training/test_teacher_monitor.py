"""teacher_monitor: the teacher is measured as evaluation would, and collapse is warned of."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.guards import CollapseWatch, Guards
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective
from dinov2_core.config.training import Crops, Optimization, TrainingConfig
from dinov2_core.data.shards import ShardWriter
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import CollapsedFeatures
from dinov2_core.evaluation.collapse import effective_rank
from dinov2_core.evaluation.labelled_set import EncodedImage, LabelledPair, LabelledSet
from dinov2_core.evaluation.preprocessing import normalise
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.step_report import GuardReport, StepReport
from dinov2_core.training.teacher_monitor import KnnProbe, TeacherMonitor

HEAD = Head(num_prototypes=64, bottleneck_dim=16, hidden_dim=32)
CONFIG = TrainingConfig(
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
)
WATCH = CollapseWatch(
    every_steps=2, grace_steps=0, num_images=12, min_effective_rank=0.0, min_prototype_usage=0.0
)
HEALTHY = StepReport(
    step=1,
    losses={"total": 1.0, "teacher_entropy": 2.0, "prototype_usage": 1.0},
    gradient_norms={},
    schedule=StepSchedule(
        learning_rate=0.1,
        prototype_learning_rate=0.0,
        weight_decay=0.04,
        teacher_momentum=0.99,
        teacher_temperature=0.05,
    ),
    images_per_second=10.0,
    seconds=0.8,
    data_seconds=0.1,
    phase_seconds={},
    guards=GuardReport(is_skipped=False, num_skipped=0, num_rollbacks=0, learning_rate_factor=1.0),
    writes_checkpoint=False,
)


def png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(directory, target_size_bytes=4000) as writer:
        for _ in range(16):
            content = png(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            writer.add(content, extension="png", width=20, height=20)
    return directory


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.fixture
def run(ranks: Ranks, tmp_path: Path) -> TrainingRun:
    return TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "checkpoints")


def labelled(*, shift: int) -> LabelledSet:
    """Dark and bright images, which any backbone tells apart."""
    images = [np.full((20, 20, 3), 20 + 200 * (i % 2), dtype=np.uint8) for i in range(10)]
    return LabelledSet(
        images=tuple(EncodedImage(name=str(i), content=png(im)) for i, im in enumerate(images)),
        labels=np.array([(i + shift) % 2 for i in range(10)], dtype=np.int64),
        classes=("0", "1"),
    )


def probe(*, shift: int = 0, every_steps: int = 2, min_top1: float = 0.0) -> KnnProbe:
    """A probe of which the share `1 - shift` is classified correctly."""
    return KnnProbe(
        images=LabelledPair(train=labelled(shift=0), test=labelled(shift=shift)),
        every_steps=every_steps,
        num_neighbours=20,
        min_top1=min_top1,
    )


class Setup:
    """Makes monitors of a run under settings."""

    def __init__(self, run: TrainingRun, ranks: Ranks, shards: Path) -> None:
        self.run, self._ranks, self._shards = run, ranks, shards

    def monitor(self, watch: CollapseWatch, *, probe: KnnProbe | None = None) -> TeacherMonitor:
        config = CONFIG.model_copy(update={"guards": Guards(collapse=watch)})
        return TeacherMonitor(
            config, run=self.run, ranks=self._ranks, images=self._shards, probe=probe
        )


@pytest.fixture
def setup(run: TrainingRun, ranks: Ranks, shards: Path) -> Setup:
    return Setup(run, ranks, shards)


def test_nothing_is_measured_between_the_steps_asked_for(setup: Setup) -> None:
    monitor = setup.monitor(WATCH, probe=probe(every_steps=4))
    measured = [monitor.measure(replace(HEALTHY, step=step)) for step in (0, 1, 2, 3, 59)]
    rank = {"teacher/effective_rank"}
    names = [set(measurement.metrics) for measurement in measured]
    assert names == [set(), rank, set(), *[rank | {"probe/knn_top1"}] * 2]
    assert measured[3].metrics["probe/knn_top1"] == 1.0


def test_the_effective_rank_is_that_of_the_fixed_images(setup: Setup) -> None:
    monitor = setup.monitor(WATCH.model_copy(update={"num_images": 6}))
    measured = monitor.measure(HEALTHY).metrics["teacher/effective_rank"]
    images = normalise(monitor.displayed_images, preprocessing=monitor.preprocessing)
    expected = effective_rank(setup.run.teacher_features(images).cls.float())
    assert measured == pytest.approx(expected, rel=1e-5)
    assert monitor.patch_tokens().shape == (6, 16, 32)


def test_a_crossed_threshold_warns_or_stops(setup: Setup) -> None:
    strict = WATCH.model_copy(update={"min_effective_rank": 100.0})
    warnings = setup.monitor(strict, probe=probe(shift=1, min_top1=0.5)).measure(HEALTHY).warnings
    assert [warning.split()[0] for warning in warnings] == ["effective_rank", "knn_top1"]
    assert "knn_top1 0 is less than 0.5 (probe.min_top1)" in warnings
    stopping = setup.monitor(strict.model_copy(update={"action": "stop"}))
    with pytest.raises(CollapsedFeatures, match=r"step 1: effective_rank .* is less than 100 \(gu"):
        stopping.measure(HEALTHY)
    patient = strict.model_copy(update={"grace_steps": 2, "action": "stop"})
    assert not setup.monitor(patient, probe=probe(shift=1, min_top1=0.5)).measure(HEALTHY).warnings


def test_a_skipped_step_is_no_warning_of_collapse(setup: Setup) -> None:
    monitor = setup.monitor(WATCH.model_copy(update={"min_prototype_usage": 1.0}))
    low = replace(HEALTHY, losses=HEALTHY.losses | {"prototype_usage": 0.1})
    assert monitor.measure(low).warnings
    assert not monitor.measure(replace(low, guards=replace(low.guards, is_skipped=True))).warnings


@torch.no_grad()
def test_features_that_are_not_finite_are_not_measured_and_stop_nothing(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    strict = WATCH.model_copy(update={"min_effective_rank": 100.0, "action": "stop"})
    monitor = setup.monitor(strict, probe=probe(min_top1=0.9))
    for parameter in setup.run._model.teacher.parameters():
        parameter.fill_(torch.nan)
    measurement = monitor.measure(HEALTHY)
    assert measurement.metrics == {}
    assert measurement.warnings == ()
    assert caplog.record_tuples == [
        (
            "dinov2_core.training.teacher_monitor",
            logging.WARNING,
            "step 1: the teacher's features of fixed images are not finite, so that effective_rank "
            "and knn_top1 cannot be measured",
        )
    ]


def test_measuring_changes_nothing(setup: Setup) -> None:
    monitor = setup.monitor(WATCH)
    before = state_of(setup.run)
    monitor.measure(HEALTHY)
    monitor.patch_tokens()
    after = state_of(setup.run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def state_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Copies of everything that a checkpoint holds."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in run._state().items()
    }
