"""Measures a teacher's features beside baselines and pictures them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.evaluate.config import EvaluateSettings, EvaluateStage, EvaluationSet
from components.runtime.manifests import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationReport,
    digest_of,
    digest_of_file,
)
from components.runtime.stage import Stage, StageContext, run_stage, stage_parser
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.data.shards import ShardReader
from dinov2_core.evaluation import pictures
from dinov2_core.evaluation.baselines import raw_pixels, untrained
from dinov2_core.evaluation.collapse import collapse_report
from dinov2_core.evaluation.features import Backbone, extract_features
from dinov2_core.evaluation.knn import knn_accuracies, nearest_neighbours
from dinov2_core.evaluation.labelled_set import LabelledSet, read_labelled_pair
from dinov2_core.evaluation.logistic import logistic_score
from dinov2_core.evaluation.preprocessing import (
    EncodedImage,
    Preprocessing,
    denormalise,
    preprocessed_batches,
)
from dinov2_core.evaluation.teacher import Teacher, load_teacher
from dinov2_core.models import build_backbone

NUM_COLLAPSE_IMAGES = 1024
NUM_PICTURED = 12
BASELINES = ("untrained", "pixels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; its flags are those of the component."""
    parser = stage_parser("Measure a teacher's features.", "dataset", "checkpoint")
    return run_stage("evaluate", args=parser.parse_args(argv), prepare=_stage)


def _stage(args: argparse.Namespace) -> Stage[EvaluationReport]:
    config = EvaluateStage.model_validate_json(args.config)
    dataset = DatasetManifest.read(args.dataset)
    checkpoint = CheckpointManifest.read(args.checkpoint)
    evaluation_sha256 = digest_of(
        {
            "sets": [_identity(item) for item in config.sets],
            "settings": config.settings.model_dump(mode="json"),
        }
    )

    def work(place: StageContext) -> EvaluationReport:
        return _Evaluation(config, dataset, checkpoint, place).report(evaluation_sha256)

    return Stage(
        manifest_type=EvaluationReport,
        settings=config,
        identity={"evaluation": evaluation_sha256},
        parents=(dataset, checkpoint),
        work=work,
    )


def _identity(item: EvaluationSet) -> object:
    """A labelled set by what it holds, not by where it lies."""
    return {"name": item.name, "train": _content(item.train), "test": _content(item.test)}


def _content(place: str) -> object:
    path = Path(place)
    if path.is_file():
        return digest_of_file(path)
    if not path.is_dir():
        raise ValueError(
            f"evaluation set {place} does not exist; set evaluation_sets to existing places"
        )
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return [(item.relative_to(path).as_posix(), digest_of_file(item)) for item in files]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Features of the two halves of a labelled set."""

    train: Tensor
    test: Tensor


class _Evaluation:
    """One evaluation at work."""

    def __init__(
        self,
        config: EvaluateStage,
        dataset: DatasetManifest,
        checkpoint: CheckpointManifest,
        place: StageContext,
    ) -> None:
        self.settings: EvaluateSettings = config.settings
        self.sets = config.sets
        self.dataset = dataset
        self.checkpoint = checkpoint
        self.place = place
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        described: TeacherConfig = checkpoint.teacher
        self.teacher: Teacher = load_teacher(
            place.download(checkpoint.teacher_uri),
            backbone=described.backbone,
            image_size_pixels=described.image_size_pixels,
        )
        self.teacher.backbone.to(self.device)
        self.preprocessing = Preprocessing(
            size_pixels=self.settings.image_size_pixels or described.image_size_pixels,
            mean=described.mean,
            standard_deviation=described.standard_deviation,
        )
        self.drawn: dict[str, bytes] = {}

    def report(self, evaluation_sha256: str) -> EvaluationReport:
        """Measure everything, draw the pictures, log both."""
        metrics: dict[str, float] = {}
        for item in self.sets:
            metrics |= self._labelled(item)
        metrics |= self._collapse()
        directory = self.place.directory / "figures"
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, png in self.drawn.items():
            (directory / name).write_bytes(png)
            self.place.run.log_picture(name, png)
            paths.append(self.place.uri(directory / name))
        return EvaluationReport(
            uri=self.place.uri(self.place.directory),
            sha256=digest_of(metrics),
            config_sha256=self.place.config_sha256,
            parents=self.place.parents,
            mlflow_run_id=self.place.run.run_id,
            metrics=metrics,
            evaluation_sha256=evaluation_sha256,
            pictures=tuple(paths),
        )

    def _labelled(self, item: EvaluationSet) -> dict[str, float]:
        pair = read_labelled_pair(train=Path(item.train), test=Path(item.test))
        train = _evenly(pair.train, self.settings.max_train_images)
        test = _evenly(pair.test, self.settings.max_test_images)
        described = self.checkpoint.teacher
        build = partial(
            build_backbone,
            described.backbone,
            image_size_pixels=described.image_size_pixels,
        )
        random_backbone = untrained(build, seed=self.settings.seed).to(self.device)
        pixel_size = min(self.settings.pixel_size_pixels, self.preprocessing.size_pixels)
        small = Preprocessing(
            size_pixels=pixel_size,
            mean=self.preprocessing.mean,
            standard_deviation=self.preprocessing.standard_deviation,
        )
        subjects: dict[str, tuple[Backbone, Preprocessing]] = {
            "teacher": (self.teacher.backbone.features, self.preprocessing),
            "untrained": (random_backbone.features, self.preprocessing),
            "pixels": (raw_pixels, small),
        }
        metrics: dict[str, float] = {}
        bars: list[pictures.MeasuredAccuracy] = []
        for subject, (backbone, preprocessing) in subjects.items():
            task = f"{item.name}, {subject}"
            measured = Measured(
                train=self._features(backbone, train, preprocessing, f"{task}: train features"),
                test=self._features(backbone, test, preprocessing, f"{task}: test features"),
            )
            if subject == "pixels":
                measured = _without_equal_channels(measured, len(preprocessing.mean))
            scores = self._scores(measured, train, test, task=task)
            suffix = "" if subject == "teacher" else f"_{subject}"
            metrics |= {f"{item.name}/{name}{suffix}": value for name, value in scores.items()}
            bars += [
                pictures.MeasuredAccuracy(subject=subject, measure=label, top1=scores[name])
                for name, label in (
                    ("knn_top1", f"{self.settings.neighbours[-1]} nearest neighbours"),
                    ("logistic_top1", "logistic regression"),
                )
            ]
            if subject == "teacher":
                self._draw(item.name, measured, train, test)
        figure = pictures.accuracy_figure(bars)
        self.drawn[f"{item.name}_accuracy.png"] = pictures.png_bytes(figure)
        return metrics

    def _scores(
        self, measured: Measured, train: LabelledSet, test: LabelledSet, *, task: str
    ) -> dict[str, float]:
        train_labels, test_labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
        by_k = knn_accuracies(
            train_features=measured.train,
            train_labels=train_labels,
            test_features=measured.test,
            test_labels=test_labels,
            num_neighbours=self.settings.neighbours,
        )
        self.place.report(f"{task}: logistic regression", 0, 1, unit="fit")
        logistic = logistic_score(
            train_features=measured.train,
            train_labels=train_labels,
            test_features=measured.test,
            test_labels=test_labels,
            seed=self.settings.seed,
        )
        self.place.report(f"{task}: logistic regression", 1, 1, unit="fit")
        return {
            **{f"knn{k}_top1": value for k, value in by_k.items()},
            "knn_top1": by_k[self.settings.neighbours[-1]],
            "logistic_top1": logistic.top1,
        }

    def _features(
        self, backbone: Backbone, images: LabelledSet, preprocessing: Preprocessing, task: str
    ) -> Tensor:
        batches = preprocessed_batches(
            images.images, preprocessing=preprocessing, batch_size=self.settings.batch_size
        )
        return extract_features(
            backbone,
            batches=batches,
            total=len(images),
            device=self.device,
            progress=lambda done, total: self.place.report(task, done, total),
        ).cls

    def _draw(self, name: str, measured: Measured, train: LabelledSet, test: LabelledSet) -> None:
        chosen = test.subset(_spread(len(test), NUM_PICTURED))
        shown = self._pixels(chosen.images)
        with torch.no_grad():
            tokens = self.teacher.backbone.features(self._normalised(chosen.images))
        grid = self.preprocessing.size_pixels // self.checkpoint.teacher.backbone.patch_size_pixels
        figure = pictures.patch_components_figure(
            shown, patches=tokens.patches.float().cpu(), grid_height=grid
        )
        self.drawn[f"{name}_patch_components.png"] = pictures.png_bytes(figure)
        self.drawn[f"{name}_scatter.png"] = pictures.png_bytes(
            pictures.scatter_figure(measured.test, labels=test.labels, classes=test.classes)
        )
        queries = _spread(len(test), 8)
        near = nearest_neighbours(
            measured.test[queries], references=measured.train, num_neighbours=8
        )
        retrievals = [
            pictures.Retrieval(
                query=self._pixels([test.images[query]])[0],
                query_class=test.classes[test.labels[query]],
                neighbours=self._pixels([train.images[int(i)] for i in indices]),
                neighbour_classes=tuple(train.classes[train.labels[int(i)]] for i in indices),
            )
            for query, indices in zip(queries, near.indices, strict=True)
        ]
        figure = pictures.retrieval_figure(retrievals)
        self.drawn[f"{name}_neighbours.png"] = pictures.png_bytes(figure)

    def _normalised(self, images: Sequence[EncodedImage]) -> Tensor:
        batches = preprocessed_batches(
            images, preprocessing=self.preprocessing, batch_size=len(images)
        )
        return next(iter(batches)).to(self.device)

    def _pixels(self, images: Sequence[EncodedImage]) -> NDArray[np.uint8]:
        return denormalise(self._normalised(images).cpu(), preprocessing=self.preprocessing)

    def _collapse(self) -> dict[str, float]:
        """Indicators on curated training images, so that they exist without labels."""
        with ShardReader(self.place.download(self.dataset.shards_uri)) as reader:
            chosen = _spread(len(reader), NUM_COLLAPSE_IMAGES)
            images = [
                EncodedImage(name=reader.entry(i).sha256, content=reader.read(i)) for i in chosen
            ]
        batches = preprocessed_batches(
            images, preprocessing=self.preprocessing, batch_size=self.settings.batch_size
        )
        cls = extract_features(
            self.teacher.backbone.features,
            batches=batches,
            total=len(images),
            device=self.device,
            progress=lambda done, total: self.place.report("collapse indicators", done, total),
        ).cls
        if not self.drawn:
            self._draw_unlabelled(images[:NUM_PICTURED])
        with torch.no_grad():
            scores = self.teacher.dino_head(cls).logits()
        report = collapse_report(cls, scores=scores)
        metrics = {
            "collapse/effective_rank": report.effective_rank,
            "collapse/feature_deviation": report.feature_deviation,
            "collapse/mean_cosine": report.mean_cosine,
        }
        if report.prototypes is not None:
            metrics["collapse/prototype_share"] = report.prototypes.share
            metrics["collapse/effective_prototypes"] = report.prototypes.effective_number
        return metrics

    def _draw_unlabelled(self, images: Sequence[EncodedImage]) -> None:
        with torch.no_grad():
            tokens = self.teacher.backbone.features(self._normalised(images))
        grid = self.preprocessing.size_pixels // self.checkpoint.teacher.backbone.patch_size_pixels
        figure = pictures.patch_components_figure(
            self._pixels(images), patches=tokens.patches.float().cpu(), grid_height=grid
        )
        self.drawn["patch_components.png"] = pictures.png_bytes(figure)


def _without_equal_channels(pixels: Measured, num_channels: int) -> Measured:
    """Raw pixels of gray images once instead of once per channel; angles stay as they are."""
    halves = [(half, half.chunk(num_channels, dim=1)) for half in (pixels.train, pixels.test)]
    if all(torch.equal(part, parts[0]) for _, parts in halves for part in parts):
        return Measured(train=halves[0][1][0], test=halves[1][1][0])
    return pixels


def _spread(total: int, wanted: int) -> list[int]:
    """Evenly spread positions."""
    positions = np.linspace(0, total - 1, min(total, wanted)).round()
    return [int(position) for position in positions]


def _evenly(images: LabelledSet, limit: int) -> LabelledSet:
    return images if len(images) <= limit else images.subset(_spread(len(images), limit))
