"""Tiny random teachers with the manifests that a training stage would have written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from components.runtime.manifests import CheckpointManifest, DatasetManifest
from dinov2_core.config.backbone import Backbone, Dimensions, TeacherConfig
from dinov2_core.config.objectives import Head
from dinov2_core.data.shards import ShardWriter
from dinov2_core.models import build_backbone, build_head

BACKBONE = Backbone(
    architecture=Dimensions(embed_dim=32, depth=2, num_heads=2), patch_size_pixels=7
)
IMAGE_SIZE = 28


def random_checkpoint(folder: Path, *, seed: int = 0) -> CheckpointManifest:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    backbone = build_backbone(BACKBONE, image_size_pixels=IMAGE_SIZE)
    head = build_head(Head(num_prototypes=16, bottleneck_dim=8, hidden_dim=16), in_dim=32)
    tensors = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    tensors |= {f"dino_head.{k}": v for k, v in head.state_dict().items()}
    save_file(tensors, folder / "teacher.safetensors")
    return CheckpointManifest(
        uri=str(folder),
        sha256=f"{seed:064x}",
        config_sha256="0",
        phase="pretrain",
        teacher_uri=str(folder / "teacher.safetensors"),
        checkpoints_uri=str(folder / "checkpoints"),
        teacher=TeacherConfig(
            backbone=BACKBONE,
            image_size_pixels=IMAGE_SIZE,
            mean=(0.5, 0.5, 0.5),
            standard_deviation=(0.5, 0.5, 0.5),
        ),
        step=3,
        final_losses={"total": 1.0},
        images_per_second=10.0,
    )


def dataset_of(images: list[bytes], folder: Path) -> DatasetManifest:
    with ShardWriter(folder / "shards", target_size_bytes=1 << 20) as writer:
        for content in images:
            writer.add(content, extension="png", width=28, height=28)
    return DatasetManifest(
        uri=str(folder),
        sha256="d",
        config_sha256="0",
        num_images=len(images),
        num_kept=len(images),
        reasons={},
        table_uri="",
        shards_uri=str(folder / "shards"),
        num_shards=1,
        size_bytes=1,
    )
