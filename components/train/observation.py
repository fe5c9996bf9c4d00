"""Observer: looks at the teacher while it trains, all ranks together."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.runtime.image_sources.labelled import read_labelled_pair, read_labelled_set
from components.train.config import Probe
from components.train.job import Job
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.evaluation.collapse import effective_rank
from dinov2_core.evaluation.knn import knn_accuracies
from dinov2_core.evaluation.labelled_set import EncodedImage, LabelledPair, LabelledSet
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
"""Images are looked at in this resolution or the global crop's, whichever is less."""
NUM_PICTURED = 6
BATCH_SIZE = 64
HELD_OUT = 5
"""One in so many labelled images is held out where there is no test set."""


class Collapsed(Exception):
    """A sign of collapse stops the run, as guards.collapse.action asks; raised on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen after a step, the same on every rank."""

    metrics: dict[str, float]
    """Under the names that MLflow shows; empty when nothing was due."""
    signs: tuple[str, ...]
    """Indicators that crossed their threshold, as sentences."""


class Observer:
    """Measures the teacher on fixed images between two steps. Collective.

    Every rank holds and looks at its share of the images.

    Args:
        job: Settings and places.
        run: The run at the step it has reached.
        ranks: Who trains together.

    Raises:
        ValueError: The probe's images cannot be read.
    """

    def __init__(self, job: Job, *, run: TrainingRun, ranks: Ranks) -> None:
        learning = job.stage.learning
        self._run = run
        self._ranks = ranks
        self._learning = learning
        self.preprocessing = _preprocessing(learning)
        watch = learning.guards.collapse
        with ShardReader(job.images) as reader:
            chosen = _spread(len(reader), watch.num_images)
            images = [
                EncodedImage(name=reader.entry(i).sha256, content=reader.read(i)) for i in chosen
            ]
        self._fixed = self._share(images)
        self.pictured = _pixels(
            [images[i] for i in _spread(len(images), NUM_PICTURED)], self.preprocessing
        )
        """Images whose patch tokens are pictured [n, S, S, C], uint8."""
        probe = job.stage.probe
        self._probe = None if probe is None else _LabelledProbe(probe, observer=self)

    def __call__(self, report: StepReport) -> Observation:
        """Look at the teacher after a step, as far as that is due.

        Raises:
            Collapsed: An indicator crossed its threshold, and that is to stop the run.
        """
        watch, step = self._learning.guards.collapse, report.step
        metrics: dict[str, float] = {}
        indicators = {}
        if not report.guards.is_skipped:
            names = ("teacher_entropy", "prototype_usage")
            indicators = {name: report.losses[name] for name in names}
        if self._is_due(step, every=watch.every_steps):
            rank = effective_rank(self._fixed.features().cpu())
            indicators["effective_rank"] = self._agreed(rank)
            metrics["teacher/effective_rank"] = indicators["effective_rank"]
        signs = collapse_warnings(
            watch,
            step=step,
            num_prototypes=self._learning.dino.head.num_prototypes,
            indicators=indicators,
        )
        if self._probe is not None and self._is_due(step, every=self._probe.settings.every_steps):
            top1 = self._agreed(self._probe.top1())
            metrics["probe/knn_top1"] = top1
            if step >= watch.grace_steps and top1 < self._probe.settings.min_top1:
                limit = self._probe.settings.min_top1
                signs += (f"knn_top1 {top1:.4g} is less than {limit:.4g} (probe.min_top1)",)
        if signs and watch.action == "stop":
            raise Collapsed(
                f"step {step}: {'; '.join(signs)}; the features collapse: lower "
                "optimization.base_learning_rate, raise koleo.weight or look at the images; set "
                "guards.collapse.action to warn to go on"
            )
        return Observation(metrics=metrics, signs=signs)

    def patches_of_pictured(self) -> Tensor:
        """Patch tokens [n, N, D] of the pictured images, float32 on the CPU. Collective."""
        images = normalise(self.pictured, preprocessing=self.preprocessing)
        return self._run.teacher_features(images).patches.float().cpu()

    def _is_due(self, step: int, *, every: int) -> bool:
        is_last = step + 1 == self._learning.optimization.num_steps
        return is_last or (step + 1) % every == 0

    def _share(self, images: list[EncodedImage]) -> _SharedImages:
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
        images: list[EncodedImage],
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


class _LabelledProbe:
    """A labelled set for a nearest-neighbour vote."""

    def __init__(self, settings: Probe, *, observer: Observer) -> None:
        self.settings = settings
        pair = _labelled_pair(settings)
        self._num_neighbours = min(settings.num_neighbours, len(pair.train))
        self._labels = (torch.from_numpy(pair.train.labels), torch.from_numpy(pair.test.labels))
        self._images = tuple(observer._share(list(part.images)) for part in (pair.train, pair.test))

    def top1(self) -> float:
        """Share of the test images that are classified rightly. Collective."""
        train, test = (images.features().cpu() for images in self._images)
        k = self._num_neighbours
        scores = knn_accuracies(
            train_features=train,
            train_labels=self._labels[0],
            test_features=test,
            test_labels=self._labels[1],
            num_neighbours=(k,),
        )
        return scores[k]


def _preprocessing(learning: TrainingConfig) -> Preprocessing:
    patch = learning.backbone.patch_size_pixels
    size = min(learning.crops.global_crop_size_pixels, max(MAX_SIZE_PIXELS // patch, 1) * patch)
    return Preprocessing(
        size_pixels=size,
        mean=learning.crops.mean,
        standard_deviation=learning.crops.standard_deviation,
    )


def _labelled_pair(probe: Probe) -> LabelledPair:
    if probe.test:
        pair = read_labelled_pair(train=probe.train, test=probe.test)
    else:
        both = read_labelled_set(probe.train)
        held_out = range(0, len(both), HELD_OUT)
        kept = sorted(set(range(len(both))) - set(held_out))
        if not kept:
            raise ValueError(
                f"probe.train {probe.train} has {len(both)} images, of which one in {HELD_OUT} is "
                "held out; give more images, or a probe.test"
            )
        pair = LabelledPair(train=both.subset(kept), test=both.subset(list(held_out)))
    return LabelledPair(
        train=_evenly(pair.train, probe.max_train_images),
        test=_evenly(pair.test, probe.max_test_images),
    )


def _evenly(images: LabelledSet, limit: int) -> LabelledSet:
    return images.subset(_spread(len(images), limit))


def _pixels(images: list[EncodedImage], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resized and cut to squares [n, S, S, C]."""
    return np.stack(
        [
            resize_and_crop(
                decode(image, num_channels=preprocessing.num_channels), preprocessing=preprocessing
            )
            for image in images
        ]
    )


def _spread(total: int, wanted: int) -> list[int]:
    """Evenly spread positions."""
    return [int(i) for i in np.linspace(0, total - 1, min(total, wanted)).round()]
