"""batches: the settings of crops, masks and parts reach the loader and the batch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_core.config.augmentation import Masking
from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.execution import Execution
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective
from dinov2_core.config.training import Crops, Optimization, TrainingConfig
from dinov2_core.data.shards import ShardReader, ShardWriter
from dinov2_core.distributed.mesh import process_group
from dinov2_core.errors import SettingsError
from dinov2_core.training.batches import mask_recipe, parts_of, pretrain_loader

HEAD = Head(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=16, depth=1, num_heads=2), patch_size_pixels=4
    ),
    crops=Crops(global_crop_size_pixels=24, local_crop_size_pixels=8, num_local_crops=3),
    masking=Masking(probability=1.0, ratio=(0.2, 0.4)),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    optimization=Optimization(global_batch_size=4, accumulation_steps=2),
    execution=Execution(pads_masked_patches=True),
)


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    with ShardWriter(tmp_path, target_size_bytes=4000) as writer:
        for level in range(4):
            buffer = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), level, dtype=np.uint8)).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=20, height=20)
    return ShardReader(tmp_path)


def test_parts_are_of_one_padded_size(reader: ShardReader) -> None:
    recipe = mask_recipe(CONFIG)
    assert (recipe.grid_height, recipe.grid_width) == (6, 6)
    with (
        process_group() as ranks,
        pretrain_loader(reader, config=CONFIG, ranks=ranks, start_step=0, num_threads=1) as loader,
    ):
        batch = next(loader)
    assert batch.global_crops.shape == (8, 3, 24, 24)
    assert batch.local_crops.shape == (12, 3, 8, 8)
    assert (batch.masks.sum(dim=1) > 0).all()
    parts = parts_of(batch, config=CONFIG)
    assert [part.global_crops.shape[0] for part in parts] == [4, 4]
    sizes = {part.masked_indices.shape[0] for part in parts}
    assert sizes == {recipe.most_masked(4, global_batch_size=4)}
    assert sum(part.num_masked for part in parts) == batch.num_masked
    unpadded = CONFIG.model_copy(update={"execution": Execution()})
    assert [p.masked_indices.shape[0] for p in parts_of(batch, config=unpadded)] == [
        part.num_masked for part in parts
    ]


def test_a_batch_must_fit_into_the_data_set(reader: ShardReader) -> None:
    large = CONFIG.model_copy(update={"optimization": Optimization(global_batch_size=5)})
    message = "global_batch_size 5 is more than the 4 images"
    with process_group() as ranks, pytest.raises(SettingsError, match=message):
        pretrain_loader(reader, config=large, ranks=ranks, start_step=0, num_threads=1)
