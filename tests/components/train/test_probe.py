"""probe: labelled images are thinned evenly, and some are held out where there is no test set."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.train.config import Probe
from components.train.probe import knn_probe
from dinov2_core.errors import InputError
from dinov2_core.evaluation.labelled_set import LabelledSet


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.parquet"
    images = [str(i).encode() for i in range(20)]
    pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(20)]}), path)
    return path


def contents(images: LabelledSet) -> list[int]:
    return [int(image.content) for image in images.images]  # type: ignore[arg-type]


def test_every_fifth_image_is_held_out_without_a_test_set(path: Path) -> None:
    probe = knn_probe(Probe(train=str(path), every_steps=7, min_top1=0.5, num_neighbours=3))
    assert contents(probe.images.test) == [0, 5, 10, 15]
    assert contents(probe.images.train) == [i for i in range(20) if i % 5]
    assert (probe.every_steps, probe.min_top1, probe.num_neighbours) == (7, 0.5, 3)


def test_sets_are_thinned_evenly(path: Path) -> None:
    settings = Probe(train=str(path), test=str(path), max_train_images=3, max_test_images=2)
    probe = knn_probe(settings)
    assert contents(probe.images.train) == [0, 10, 19]
    assert contents(probe.images.test) == [0, 19]


def test_too_few_images_are_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(InputError, match="has 1 images, of which one in 5 is held out"):
        knn_probe(Probe(train=str(path)))
