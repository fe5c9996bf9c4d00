"""TeacherMonitor: measures the teacher on fixed images while it trains, all ranks together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.errors import CollapsedFeatures
from dinov2_core.evaluation.collapse import effective_rank
from dinov2_core.evaluation.knn import knn_accuracies
from dinov2_core.evaluation.labelled_set import EncodedImage, LabelledPair, evenly_spaced
from dinov2_core.evaluation.preprocessing import (
    Preprocessing,
    decode,
    normalise,
    resize_and_crop,
)
from dinov2_core.training.guard_state import collapse_warnings
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.step_report import StepReport

logger = logging.getLogger(__name__)

MAX_SIZE_PIXELS = 224
"""Images are measured at this resolution or the global crop's, whichever is less."""
NUM_DISPLAYED = 6
BATCH_SIZE = 64
METRICS = {"effective_rank": "teacher/effective_rank", "knn_top1": "probe/knn_top1"}
"""Names that MLflow shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnProbe:
    """A labelled set that is classified by its nearest neighbours now and then."""

    images: LabelledPair
    every_steps: int
    num_neighbours: int
    """Neighbours that vote, all labelled images where there are fewer."""
    min_top1: float
    """Least share classified correctly, below which there is a warning of collapse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Result of one step, the same on every rank."""

    metrics: dict[str, float]
    """Under the names that MLflow shows; empty when nothing was due."""
    warnings: tuple[str, ...]
    """Indicators of collapse that crossed their threshold, as sentences."""


class TeacherMonitor:
    """Measures the teacher on fixed images between two steps. Collective.

    Every rank holds its share of the images.

    Args:
        config: What is learned.
        run: The run at the step it has reached.
        ranks: Who trains together.
        images: Directory of the shards from which the fixed images come.
        probe: Labelled images, if the teacher is to be probed.

    Raises:
        InputError: An image cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        run: TrainingRun,
        ranks: Ranks,
        images: Path,
        probe: KnnProbe | None = None,
    ) -> None:
        self._config = config
        self._run = run
        self._ranks = ranks
        self.preprocessing = _preprocessing(config)
        with ShardReader(images) as reader:
            chosen = evenly_spaced(len(reader), config.guards.collapse.num_images)
            fixed = [
                EncodedImage(name=entry.sha256, content=partial(reader.read, number))
                for number, entry in zip(chosen, reader.entries(chosen), strict=True)
            ]
            self._fixed = self._shared(fixed)
            self.displayed_images = _pixels(
                [fixed[i] for i in evenly_spaced(len(fixed), NUM_DISPLAYED)], self.preprocessing
            )
            """Images for figures of patch tokens [n, S, S, C], uint8."""
        self._probe = probe
        sets = (probe.images.train, probe.images.test) if probe else ()
        self._labelled = [self._shared(part.images) for part in sets]

    def measure(self, report: StepReport) -> Measurement:
        """Measure the teacher after a step, as far as that is due.

        Features that are not finite give no number: the guards of the run skip such steps and go
        back to a checkpoint.

        Raises:
            CollapsedFeatures: An indicator crossed its threshold, and that is to stop the run.
        """
        watch, step = self._config.guards.collapse, report.step
        measured: dict[str, float] = {}
        if self._is_due(step, every=watch.every_steps):
            measured["effective_rank"] = self._effective_rank()
        if self._probe is not None and self._is_due(step, every=self._probe.every_steps):
            measured["knn_top1"] = self._knn_top1(self._probe)
        finite = {name: value for name, value in measured.items() if math.isfinite(value)}
        if len(finite) < len(measured) and self._ranks.is_main_rank:
            logger.warning(
                "step %d: the teacher's features of fixed images are not finite, so that "
                "%s cannot be measured",
                step,
                " and ".join(name for name in measured if name not in finite),
            )
        warnings = self._warnings(report, measured=finite)
        if warnings and watch.action == "stop":
            raise CollapsedFeatures(
                f"step {step}: {'; '.join(warnings)}; the features collapse: lower "
                "optimization.base_learning_rate, raise koleo.weight or check the images; set "
                "guards.collapse.action to warn to go on"
            )
        return Measurement(
            metrics={METRICS[name]: value for name, value in finite.items()}, warnings=warnings
        )

    def patch_tokens(self) -> Tensor:
        """Patch tokens [n, N, D] of the displayed images, float32 on the CPU. Collective."""
        images = normalise(self.displayed_images, preprocessing=self.preprocessing)
        return self._run.teacher_features(images).patches.float().cpu()

    def _warnings(self, report: StepReport, *, measured: dict[str, float]) -> tuple[str, ...]:
        watch, losses = self._config.guards.collapse, report.losses
        indicators = dict(measured)
        if not report.guards.is_skipped:
            indicators |= {name: losses[name] for name in ("teacher_entropy", "prototype_usage")}
        warnings = collapse_warnings(
            watch,
            step=report.step,
            num_prototypes=self._config.dino.head.num_prototypes,
            indicators=indicators,
        )
        top1, least = measured.get("knn_top1"), self._probe.min_top1 if self._probe else 0.0
        if top1 is not None and top1 < least and report.step >= watch.grace_steps:
            warnings += (f"knn_top1 {top1:.4g} is less than {least:.4g} (probe.min_top1)",)
        return warnings

    def _is_due(self, step: int, *, every: int) -> bool:
        is_last = step + 1 == self._config.optimization.num_steps
        return is_last or (step + 1) % every == 0

    def _effective_rank(self) -> float:
        """Of the fixed images; NaN if their features are not finite."""
        features = self._fixed.features().cpu()
        is_finite = bool(features.isfinite().all())
        return self._agreed(effective_rank(features) if is_finite else math.nan)

    def _knn_top1(self, probe: KnnProbe) -> float:
        """Share of the test images that are classified correctly; NaN without finite features."""
        train, test = (images.features().cpu() for images in self._labelled)
        if not (train.isfinite().all() and test.isfinite().all()):
            return self._agreed(math.nan)
        k = min(probe.num_neighbours, len(train))
        accuracies = knn_accuracies(
            train_features=train,
            train_labels=torch.from_numpy(probe.images.train.labels),
            test_features=test,
            test_labels=torch.from_numpy(probe.images.test.labels),
            num_neighbours=(k,),
        )
        return self._agreed(accuracies[k])

    def _shared(self, images: Sequence[EncodedImage]) -> _SharedImages:
        return _SharedImages(
            images, preprocessing=self.preprocessing, run=self._run, ranks=self._ranks
        )

    def _agreed(self, value: float) -> float:
        """The main rank's value, so that rounding never makes ranks decide differently."""
        own = torch.tensor([value], dtype=torch.float64, device=self._ranks.device)
        return float(self._ranks.gather(own)[0, 0])


class _SharedImages:
    """Fixed images, every rank with its share of them."""

    def __init__(
        self,
        images: Sequence[EncodedImage],
        *,
        preprocessing: Preprocessing,
        run: TrainingRun,
        ranks: Ranks,
    ) -> None:
        self._num_images = len(images)
        self._preprocessing = preprocessing
        self._run = run
        self._ranks = ranks
        per_rank = -(-len(images) // ranks.world_size)
        own = [(ranks.rank + i * ranks.world_size) % len(images) for i in range(per_rank)]
        self._pixels = _pixels([images[i] for i in own], preprocessing)  # [n, S, S, C]

    def features(self) -> Tensor:
        """Cls tokens [N, D] of all images, float32, on every rank. Collective."""
        parts = []
        for start in range(0, len(self._pixels), BATCH_SIZE):
            pixels = self._pixels[start : start + BATCH_SIZE]
            images = normalise(pixels, preprocessing=self._preprocessing)
            parts.append(self._run.teacher_features(images).cls.float())
        own = torch.cat(parts)  # [n, D]
        rows = self._ranks.gather(own.flatten()).view(-1, *own.shape)  # [world_size, n, D]
        return rows.transpose(0, 1).flatten(0, 1)[: self._num_images]


def _preprocessing(config: TrainingConfig) -> Preprocessing:
    patch = config.backbone.patch_size_pixels
    size = min(config.crops.global_crop_size_pixels, max(MAX_SIZE_PIXELS // patch, 1) * patch)
    return Preprocessing(
        size_pixels=size,
        mean=config.crops.mean,
        standard_deviation=config.crops.standard_deviation,
    )


def _pixels(images: Sequence[EncodedImage], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resized and cropped to squares [n, S, S, C]."""
    return np.stack(
        [
            resize_and_crop(
                decode(image, num_channels=preprocessing.num_channels), preprocessing=preprocessing
            )
            for image in images
        ]
    )
