"""One evaluation: features of teacher and baselines, their scores and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.evaluate.config import EvaluateSettings
from components.runtime.progress import Reporter
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.data.shards import ShardReader
from dinov2_core.evaluation import feature_figures as figures
from dinov2_core.evaluation.baselines import raw_pixels, untrained
from dinov2_core.evaluation.collapse import collapse_report
from dinov2_core.evaluation.features import Backbone, extract_features
from dinov2_core.evaluation.figure_style import png_bytes
from dinov2_core.evaluation.knn import knn_accuracies, nearest_neighbours
from dinov2_core.evaluation.labelled_set import (
    EncodedImage,
    LabelledPair,
    evenly_spaced,
)
from dinov2_core.evaluation.logistic import logistic_score
from dinov2_core.evaluation.preprocessing import (
    Preprocessing,
    denormalise,
    preprocessed_batches,
)
from dinov2_core.evaluation.teacher import Teacher
from dinov2_core.models import build_backbone

NUM_COLLAPSE_IMAGES = 1024
NUM_DRAWN_IMAGES = 12
NUM_QUERIES = 8
NUM_RETRIEVED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whose features are measured."""

    name: str
    """`teacher` or a baseline's."""
    backbone: Backbone
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFeatures:
    """Features of a labelled pair."""

    train: Tensor
    """[N, D]."""
    test: Tensor
    """[Q, D]."""


class Evaluation:
    """Measures a teacher and keeps the figures that are drawn on the way."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        described: TeacherConfig,
        settings: EvaluateSettings,
        report: Reporter,
    ) -> None:
        """Put the teacher on the device.

        Args:
            teacher: Backbone and head.
            described: How it was trained.
            settings: How features are measured.
            report: Progress.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._teacher = teacher
        self._teacher.backbone.to(self._device)
        self._described = described
        self._settings = settings
        self._report = report
        self._preprocessing = Preprocessing(
            size_pixels=settings.image_size_pixels or described.image_size_pixels,
            mean=described.mean,
            standard_deviation=described.standard_deviation,
        )
        self.figures: dict[str, bytes] = {}
        """PNG files by name."""

    def measure_labelled(self, name: str, pair: LabelledPair) -> dict[str, float]:
        """Accuracies of teacher and baselines on a labelled pair."""
        pair = LabelledPair(
            train=pair.train.evenly_spaced(self._settings.max_train_images),
            test=pair.test.evenly_spaced(self._settings.max_test_images),
        )
        metrics: dict[str, float] = {}
        bars: list[figures.Accuracy] = []
        for subject in self._subjects():
            features = self._pair_features(subject, pair, task=f"{name}, {subject.name}")
            scores = self._scores(features, pair, task=f"{name}, {subject.name}")
            suffix = "" if subject.name == "teacher" else f"_{subject.name}"
            metrics |= {f"{name}/{kind}{suffix}": value for kind, value in scores.items()}
            bars += [
                figures.Accuracy(subject=subject.name, measure=label, top1=scores[kind])
                for kind, label in (
                    ("knn_top1", f"{self._settings.neighbours[-1]} nearest neighbours"),
                    ("logistic_top1", "logistic regression"),
                )
            ]
            if subject.name == "teacher":
                self._draw(name, features, pair)
        self.figures[f"{name}_accuracy.png"] = png_bytes(figures.accuracy_figure(bars))
        return metrics

    def measure_collapse(self, reader: ShardReader) -> dict[str, float]:
        """Indicators on curated training images, so that they exist without labels."""
        chosen = evenly_spaced(len(reader), NUM_COLLAPSE_IMAGES)
        images = [
            EncodedImage(name=entry.sha256, content=partial(reader.read, number))
            for number, entry in zip(chosen, reader.entries(chosen), strict=True)
        ]
        cls = self._features(self._teacher_subject, images, task="collapse indicators")
        if not self.figures:
            self._draw_components("patch_components.png", images[:NUM_DRAWN_IMAGES])
        with torch.no_grad():
            scores = self._teacher.dino_head(cls).logits()
        report = collapse_report(cls, scores=scores)
        assert report.prototypes is not None
        return {
            "collapse/effective_rank": report.effective_rank,
            "collapse/feature_deviation": report.feature_deviation,
            "collapse/mean_cosine": report.mean_cosine,
            "collapse/prototype_share": report.prototypes.share,
            "collapse/effective_prototypes": report.prototypes.effective_number,
        }

    @property
    def _teacher_subject(self) -> Subject:
        return Subject(
            name="teacher",
            backbone=self._teacher.backbone.features,
            preprocessing=self._preprocessing,
        )

    def _subjects(self) -> list[Subject]:
        """The teacher, its architecture with random weights, and small pixels."""
        described, preprocessing = self._described, self._preprocessing
        build = partial(
            build_backbone, described.backbone, image_size_pixels=described.image_size_pixels
        )
        random_backbone = untrained(build, seed=self._settings.seed).to(self._device)
        small = Preprocessing(
            size_pixels=min(self._settings.pixel_size_pixels, preprocessing.size_pixels),
            mean=preprocessing.mean,
            standard_deviation=preprocessing.standard_deviation,
        )
        return [
            self._teacher_subject,
            Subject(
                name="untrained", backbone=random_backbone.features, preprocessing=preprocessing
            ),
            Subject(name="pixels", backbone=raw_pixels, preprocessing=small),
        ]

    def _pair_features(self, subject: Subject, pair: LabelledPair, *, task: str) -> PairFeatures:
        features = PairFeatures(
            train=self._features(subject, pair.train.images, task=f"{task}: train features"),
            test=self._features(subject, pair.test.images, task=f"{task}: test features"),
        )
        is_raw = subject.backbone is raw_pixels
        return _without_equal_channels(features, subject.preprocessing) if is_raw else features

    def _features(self, subject: Subject, images: Sequence[EncodedImage], *, task: str) -> Tensor:
        batches = preprocessed_batches(
            images, preprocessing=subject.preprocessing, batch_size=self._settings.batch_size
        )
        return extract_features(
            subject.backbone,
            batches=batches,
            total=len(images),
            device=self._device,
            progress=lambda done, total: self._report(task, done, total),
        ).cls

    def _scores(self, features: PairFeatures, pair: LabelledPair, *, task: str) -> dict[str, float]:
        task = f"{task}: logistic regression"
        labels = [torch.from_numpy(part.labels) for part in (pair.train, pair.test)]
        by_k = knn_accuracies(
            train_features=features.train,
            train_labels=labels[0],
            test_features=features.test,
            test_labels=labels[1],
            num_neighbours=self._settings.neighbours,
        )
        self._report(task, 0, 1, unit="fit")
        logistic = logistic_score(
            train_features=features.train,
            train_labels=labels[0],
            test_features=features.test,
            test_labels=labels[1],
            seed=self._settings.seed,
        )
        self._report(task, 1, 1, unit="fit")
        return {
            **{f"knn{k}_top1": value for k, value in by_k.items()},
            "knn_top1": by_k[self._settings.neighbours[-1]],
            "logistic_top1": logistic.top1,
        }

    def _draw(self, name: str, features: PairFeatures, pair: LabelledPair) -> None:
        test = pair.test
        drawn = test.subset(evenly_spaced(len(test), NUM_DRAWN_IMAGES))
        self._draw_components(f"{name}_patch_components.png", drawn.images)
        self.figures[f"{name}_scatter.png"] = png_bytes(
            figures.scatter_figure(features.test, labels=test.labels, classes=test.classes)
        )
        self.figures[f"{name}_neighbours.png"] = png_bytes(
            figures.retrieval_figure(self._retrievals(features, pair))
        )

    def _draw_components(self, name: str, images: Sequence[EncodedImage]) -> None:
        normalised = self._normalised(images)
        with torch.no_grad():
            tokens = self._teacher.backbone.features(normalised)
        figure = figures.patch_components_figure(
            self._pixels(normalised),
            patches=tokens.patches.float().cpu(),
            grid_height=self._preprocessing.size_pixels
            // self._described.backbone.patch_size_pixels,
        )
        self.figures[name] = png_bytes(figure)

    def _retrievals(self, features: PairFeatures, pair: LabelledPair) -> list[figures.Retrieval]:
        """Some test images and their nearest neighbours among the train images."""
        train, test = pair.train, pair.test
        queries = evenly_spaced(len(test), NUM_QUERIES)
        near = nearest_neighbours(
            features.test[queries],
            references=features.train,
            num_neighbours=min(NUM_RETRIEVED, len(train)),
        )
        shown = self._pixels(self._normalised([test.images[i] for i in queries]))
        found = sorted({int(i) for i in near.indices.flatten()})  # in the order of their file
        pixels = dict(
            zip(
                found, self._pixels(self._normalised([train.images[i] for i in found])), strict=True
            )
        )
        return [
            figures.Retrieval(
                query=query,
                query_class=test.classes[test.labels[number]],
                neighbours=np.stack([pixels[i] for i in indices]),
                neighbour_classes=tuple(train.classes[train.labels[i]] for i in indices),
            )
            for number, query, indices in zip(queries, shown, near.indices.tolist(), strict=True)
        ]

    def _normalised(self, images: Sequence[EncodedImage]) -> Tensor:
        batches = preprocessed_batches(
            images, preprocessing=self._preprocessing, batch_size=len(images)
        )
        return next(iter(batches)).to(self._device)

    def _pixels(self, normalised: Tensor) -> NDArray[np.uint8]:
        return denormalise(normalised.cpu(), preprocessing=self._preprocessing)


def _without_equal_channels(pixels: PairFeatures, preprocessing: Preprocessing) -> PairFeatures:
    """Raw pixels of gray images once instead of once per channel; angles stay as they are."""
    parts = [half.chunk(preprocessing.num_channels, dim=1) for half in (pixels.train, pixels.test)]
    if all(torch.equal(channel, channels[0]) for channels in parts for channel in channels):
        return PairFeatures(train=parts[0][0], test=parts[1][0])
    return pixels
