"""What is measured: one training step of a ViT-S/14 on eight photographs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet

import pipelines
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.shards import ShardWriter

PHOTOGRAPHS = Path(pipelines.__file__).parent / "demo" / "fashion_mnist_train.parquet"
NUM_IMAGES = 64
SETTINGS = {
    "backbone": {"architecture": "vit_small", "patch_size_pixels": 14, "drop_path_rate": 0.3},
    "crops": {
        "global_crop_size_pixels": 224,
        "local_crop_size_pixels": 98,
        "num_local_crops": 8,
    },
    "dino": {"head": {"num_prototypes": 65536, "bottleneck_dim": 256}},
    "ibot": {"head": {"kind": "shared"}},
    "optimization": {
        "num_steps": 100_000,
        "global_batch_size": 8,
        "warmup_steps": 10,
        "freeze_prototypes_steps": 0,
    },
    "precision": "bf16",
}


def training_config() -> TrainingConfig:
    """Settings of the measured step."""
    return TrainingConfig.model_validate_json(json.dumps(SETTINGS))


def write_shards(directory: Path) -> None:
    """Real photographs for the loader."""
    images = parquet.read_table(PHOTOGRAPHS, columns=["image"])["image"][:NUM_IMAGES]
    with ShardWriter(directory, target_size_bytes=1 << 22) as writer:
        for image in images.to_pylist():
            writer.add(image, extension="png", width=28, height=28)
