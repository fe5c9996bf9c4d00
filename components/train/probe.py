"""Reads the labelled images on which a training probes its teacher."""

from __future__ import annotations

from components.runtime.image_sources.labelled import read_labelled_pair, read_labelled_set
from components.train.config import Probe
from dinov2_core.evaluation.labelled_set import LabelledPair
from dinov2_core.training.teacher_monitor import KnnProbe

HELD_OUT = 5
"""One in so many labelled images is held out where there is no test set."""


def knn_probe(settings: Probe) -> KnnProbe:
    """The probe of some settings, with its images.

    Raises:
        InputError: There are fewer than two classes, or the images cannot be read.
    """
    pair = _labelled_pair(settings)
    return KnnProbe(
        images=LabelledPair(
            train=pair.train.evenly_spaced(settings.max_train_images),
            test=pair.test.evenly_spaced(settings.max_test_images),
        ),
        every_steps=settings.every_steps,
        num_neighbours=settings.num_neighbours,
        min_top1=settings.min_top1,
    )


def _labelled_pair(settings: Probe) -> LabelledPair:
    if settings.test:
        return read_labelled_pair(train=settings.train, test=settings.test)
    labelled = read_labelled_set(settings.train)
    held_out = range(0, len(labelled), HELD_OUT)
    kept = [number for number in range(len(labelled)) if number % HELD_OUT]
    return LabelledPair(train=labelled.subset(kept), test=labelled.subset(held_out))
