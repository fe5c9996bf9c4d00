"""loader: a batch is a function of (seed, step), for any threads, ranks and starts."""

from __future__ import annotations

import io
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_core.config.augmentation import Crops, Masking
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.masking import MaskRecipe
from dinov2_core.data.shards import ShardReader, ShardWriter
from dinov2_core.errors import UnreadableImage

CROPS = Crops(global_crop_size_pixels=16, local_crop_size_pixels=8, num_local_crops=3)


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, target_size_bytes=4000) as writer:
        for _ in range(20):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=14, height=12)
    return ShardReader(tmp_path)


def loader(
    reader: ShardReader, *, rank: int = 0, world_size: int = 1, start: int = 0, threads: int = 1
) -> PretrainLoader:
    return PretrainLoader(
        reader,
        crops=CROPS,
        masks=MaskRecipe(grid_height=4, grid_width=4, masking=Masking()),
        seed=9,
        global_batch_size=8,
        rank=rank,
        world_size=world_size,
        start_step=start,
        num_threads=threads,
    )


def assert_equal(one: PretrainBatch, other: PretrainBatch) -> None:
    for field in fields(one):
        values = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(torch.as_tensor(values[0]), torch.as_tensor(values[1])), field.name


def test_resuming_equals_going_on(reader: ShardReader) -> None:
    with loader(reader) as straight, loader(reader, start=3, threads=3) as resumed:
        for _ in range(3):
            next(straight)
        for _ in range(4):
            assert_equal(next(straight), next(resumed))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batch_of_one(reader: ShardReader, world_size: int) -> None:
    whole = loader(reader).make_batch(5)
    parts = [loader(reader, rank=r, world_size=world_size).make_batch(5) for r in range(world_size)]
    for name, number in (("global_crops", 2), ("local_crops", 3), ("masks", 2)):
        joined = torch.cat(
            [getattr(part, name).unflatten(0, (number, 8 // world_size)) for part in parts], dim=1
        )
        expected = getattr(whole, name).unflatten(0, (number, 8))
        torch.testing.assert_close(joined, expected, atol=1e-5, rtol=0)


def test_shapes_and_counts(reader: ShardReader) -> None:
    batch = loader(reader).make_batch(0)
    assert batch.global_crops.shape == (16, 3, 16, 16)
    assert batch.local_crops.shape == (24, 3, 8, 8)
    assert batch.masks.shape == (16, 16)
    assert batch.num_masked == len(batch.masked_indices) == int(batch.masks.sum())
    assert int(batch.masks.any(dim=1).sum()) == 8


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "bad", target_size_bytes=100) as writer:
        sha256 = writer.add(b"no image", extension="png", width=1, height=1)
    with (
        loader(ShardReader(tmp_path / "bad"), threads=2) as broken,
        pytest.raises(UnreadableImage, match=rf"{sha256} at offset 512 of shard-00000\.tar"),
    ):
        next(broken)


def test_closing_ends_the_threads_and_the_iteration(reader: ShardReader) -> None:
    before = threading.active_count()
    opened = loader(reader, threads=3)
    next(opened)
    opened.close()
    assert threading.active_count() == before
    assert list(opened) == []


def test_impossible_settings_are_refused_at_once(reader: ShardReader) -> None:
    with pytest.raises(ValueError, match="num_threads 0"):
        loader(reader, threads=0)
    with pytest.raises(ValueError, match="not divisible by 3 ranks"):
        loader(reader, world_size=3)


def test_images_of_any_rank_are_named(reader: ShardReader) -> None:
    whole = loader(reader).image_names(5, rank=0)
    halves = [loader(reader, world_size=2).image_names(5, rank=rank) for rank in range(2)]
    assert whole == halves[0] + halves[1]
    assert len(set(whole)) == 8
    assert set(whole) <= {reader.entry(number).sha256 for number in range(20)}
