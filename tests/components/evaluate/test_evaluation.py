"""One evaluation, without a stage around it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from components.evaluate.config import EvaluateSettings
from components.evaluate.evaluation import Evaluation
from components.runtime.image_sources.labelled import read_labelled_set
from components.runtime.progress import Reporter
from dinov2_core.data.shards import ShardReader
from dinov2_core.evaluation.labelled_set import LabelledPair, LabelledSet
from dinov2_core.evaluation.teacher import load_teacher
from tests.components.teachers import dataset_of, random_checkpoint

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    checkpoint = random_checkpoint(tmp_path / "teacher")
    described = checkpoint.teacher
    teacher = load_teacher(
        Path(checkpoint.teacher_uri),
        backbone=described.backbone,
        image_size_pixels=described.image_size_pixels,
    )
    settings = EvaluateSettings(neighbours=(1, 5), max_test_images=60)
    report = Reporter(None, stage="evaluate")
    return Evaluation(teacher, described=described, settings=settings, report=report)


@pytest.fixture
def reader(tmp_path: Path, photographs: list[bytes]) -> ShardReader:
    return ShardReader(Path(dataset_of(photographs, tmp_path / "data").shards_uri))


def pixels_of(images: LabelledSet) -> np.ndarray:
    pixels = [np.asarray(Image.open(io.BytesIO(image.read()))).ravel() for image in images.images]
    return np.stack(pixels).astype(np.float32) / 255 * 2 - 1


def test_numbers_stand_beside_two_baselines_on_the_same_split(evaluation: Evaluation) -> None:
    whole = read_labelled_set(str(REPOSITORY / "pipelines/demo/fashion_mnist_test.parquet"))
    pair = LabelledPair(train=whole.subset(range(0, 160, 2)), test=whole.subset(range(1, 161, 2)))
    metrics = evaluation.measure_labelled("clothes", pair)
    kinds = ("knn1_top1", "knn5_top1", "knn_top1", "logistic_top1")
    suffixes = ("", "_untrained", "_pixels")
    assert set(metrics) == {f"clothes/{kind}{suffix}" for kind in kinds for suffix in suffixes}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics["clothes/knn_top1"] == metrics["clothes/knn5_top1"]
    test = pair.test.evenly_spaced(60)
    nearest = KNeighborsClassifier(1, metric="cosine").fit(pixels_of(pair.train), pair.train.labels)
    expected = nearest.score(pixels_of(test), test.labels)
    assert metrics["clothes/knn1_top1_pixels"] == pytest.approx(expected, abs=1e-9)
    assert set(evaluation.figures) == {
        f"clothes_{figure}.png"
        for figure in ("accuracy", "neighbours", "patch_components", "scatter")
    }


def test_without_labels_collapse_is_measured_all_the_same(
    evaluation: Evaluation, reader: ShardReader
) -> None:
    metrics = evaluation.measure_collapse(reader)
    assert set(metrics) == {
        "collapse/effective_rank", "collapse/feature_deviation", "collapse/mean_cosine",
        "collapse/prototype_share", "collapse/effective_prototypes",
    }  # fmt: skip
    assert 1 <= metrics["collapse/effective_rank"] <= 32
    assert list(evaluation.figures) == ["patch_components.png"]
