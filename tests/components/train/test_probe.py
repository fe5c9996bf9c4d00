"""probe: labelled images are thinned evenly, and some are held out where there is no test set."""

from __future__ import annotations

from pathlib import Path

import boto3
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
    return [int(image.read()) for image in images.images]


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


def test_one_class_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(InputError, match="1 images have 1 classes"):
        knn_probe(Probe(train=str(path)))


def test_a_probe_may_lie_in_a_store(s3: str, path: Path) -> None:
    client = boto3.client("s3")
    client.upload_file(str(path), "pile", "probe.parquet")
    for number in range(10):
        key = f"probe/{'ab'[number % 2]}/{number}.png"
        client.put_object(Bucket="pile", Key=key, Body=b"%d" % number)
    table = knn_probe(Probe(train="s3://pile/probe.parquet"))
    local = knn_probe(Probe(train=str(path)))
    assert contents(table.images.train) == contents(local.images.train)
    assert contents(table.images.test) == contents(local.images.test)
    folders = knn_probe(Probe(train="s3://pile/probe/"))
    assert contents(folders.images.test) == [0, 1]
    assert contents(folders.images.train) == [2, 4, 6, 8, 3, 5, 7, 9]
