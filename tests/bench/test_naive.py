"""The naive step computes what the product computes, so that timing the two is fair."""

from __future__ import annotations

import torch

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.initialization import build_student_teacher
from tests.bench.naive import NaiveTrainer
from tests.bench.workload import SETTINGS

SMALL = {
    **SETTINGS,
    "backbone": {
        "architecture": {"embed_dim": 32, "depth": 2, "num_heads": 2},
        "patch_size_pixels": 4,
        "drop_path_rate": 0.0,
        "layer_scale": 0.5,
    },
    "crops": {"global_crop_size_pixels": 16, "local_crop_size_pixels": 8, "num_local_crops": 3},
    "dino": {"head": {"num_prototypes": 48, "bottleneck_dim": 16, "hidden_dim": 24}},
    "precision": "fp32",
}


def batch() -> PretrainBatch:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(8, 16, generator=generator) < 0.4
    per_crop = masks.sum(dim=1)
    return PretrainBatch(
        global_crops=torch.randn(8, 3, 16, 16, generator=generator),
        local_crops=torch.randn(12, 3, 8, 8, generator=generator),
        masks=masks,
        masked_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1 / per_crop).repeat_interleave(per_crop),
        num_masked=int(per_crop.sum()),
    )


def test_naive_loss_equals_the_products() -> None:
    config = TrainingConfig.model_validate(SMALL, strict=False)
    product = build_student_teacher(config, device=torch.device("cpu"))
    naive = NaiveTrainer(config)
    for ours, theirs in ((product.student, naive.student), (product.teacher, naive.teacher)):
        weights = ours.backbone.state_dict()
        theirs.mask_token.data.copy_(weights.pop("mask_token"))
        theirs.backbone.load_state_dict(weights)
        theirs.head.mlp.load_state_dict(ours.dino_head.mlp.state_dict())
        theirs.head.prototypes.data.copy_(ours.dino_head.last_layer.weight_v)
    naive.teacher.eval()

    expected = accumulate_gradients(product, [batch()], teacher_temperature=0.07).total
    loss = naive.loss(batch(), teacher_temperature=0.07)

    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-5)
    loss.backward()
    torch.testing.assert_close(
        naive.student.backbone.blocks[0].attn.qkv.weight.grad,
        product.student.backbone.blocks[0].attn.qkv.weight.grad,  # type: ignore[union-attr]
        rtol=1e-3,
        atol=1e-6,
    )
