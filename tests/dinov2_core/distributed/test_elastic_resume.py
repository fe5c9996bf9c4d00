"""Resuming with another number of ranks: the same images in the same order, the same losses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_core.data.shards import ShardWriter

NUM_IMAGES, NUM_STEPS, BATCH = 24, 6, 12
RunRanks = Callable[..., list[int]]
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def train(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains on images that their red level tells apart, see `scenarios.Watched`."""
    folder = tmp_path_factory.mktemp("elastic")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards", target_size_bytes=4000) as writer:
        for number in range(NUM_IMAGES):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            pixels[..., 0] = 10 * number
            path = folder / "image.png"
            Image.fromarray(pixels).save(path)
            writer.add(path.read_bytes(), extension="png", width=20, height=20)

    def run(*runs: tuple[Path, int], world_size: int) -> list[dict[str, Any]]:
        paths = [
            path
            for checkpoints, last_step in runs
            for path in (checkpoints, checkpoints.with_suffix(".pt"), Path(str(last_step)))
        ]
        codes = run_ranks("train", folder / "shards", *paths, world_size=world_size)
        assert codes == [0] * world_size
        return [torch.load(checkpoints.with_suffix(".pt")) for checkpoints, _ in runs]

    return run


def test_another_number_of_ranks_goes_on_alike(train: Train, tmp_path: Path) -> None:
    straight, one = train((tmp_path / "straight", 6), (tmp_path / "one", 3), world_size=1)
    shutil.copytree(tmp_path / "one", tmp_path / "one_two")
    two, one_two = train((tmp_path / "two", 3), (tmp_path / "one_two", 6), world_size=2)
    for name in ("two_one", "two_three"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    (two_one,) = train((tmp_path / "two_one", 6), world_size=1)
    (two_three,) = train((tmp_path / "two_three", 6), world_size=3)
    images = straight["images"]
    assert [len(step) for step in images] == [BATCH] * NUM_STEPS
    for first in range(0, NUM_STEPS, NUM_IMAGES // BATCH):
        epoch = [image for step in images[first : first + NUM_IMAGES // BATCH] for image in step]
        assert sorted(epoch) == list(range(NUM_IMAGES))
    for stopped, resumed in ((one, one_two), (two, two_one), (two, two_three)):
        assert (len(stopped["losses"]), resumed["first"]) == (3, 3)
        assert stopped["images"] + resumed["images"] == images
        losses = stopped["losses"] + resumed["losses"]
        for ours, expected in zip(losses, straight["losses"], strict=True):
            for term in ("total", "dino_local", "dino_global", "ibot", "koleo"):
                assert ours[term] == pytest.approx(expected[term], abs=1e-5), term
