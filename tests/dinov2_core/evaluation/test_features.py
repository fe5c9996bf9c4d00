"""Features extracted batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dinov2_core.evaluation.features import extract_features
from dinov2_core.vit.transformer import VisionTransformer

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    cls: Tensor
    patches: Tensor


def summing(images: Tensor) -> Summed:
    return Summed(cls=images.sum(dim=(2, 3)), patches=images.flatten(2).transpose(1, 2))


def test_features_of_batches_are_joined_in_order() -> None:
    images = torch.randn(5, 3, 4, 4)
    seen: list[list[int]] = []
    found = extract_features(
        summing,
        batches=images.split(2),
        total=5,
        device=CPU,
        has_patch_mean=True,
        progress=lambda done, total: seen.append([done, total]),
    )
    torch.testing.assert_close(found.cls, images.sum(dim=(2, 3)))
    torch.testing.assert_close(found.patch_mean, images.mean(dim=(2, 3)))
    assert seen == [[2, 5], [4, 5], [5, 5]]


def test_half_precision_comes_back_as_float32() -> None:
    batches = [torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)]
    found = extract_features(summing, batches=batches, total=2, device=CPU)
    assert found.cls.dtype == torch.float32
    assert found.patch_mean is None


def test_a_vision_transformer_is_a_backbone() -> None:
    backbone = VisionTransformer(
        image_size_pixels=8,
        patch_size_pixels=4,
        num_channels=3,
        embed_dim=16,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
        feed_forward="mlp",
        num_register_tokens=1,
        drop_path_rate=0.0,
        layer_scale=1.0,
        position_offset=0.0,
        position_antialias=True,
    ).eval()
    images = torch.randn(3, 3, 8, 8)
    found = extract_features(backbone.features, batches=[images], total=3, device=CPU)
    torch.testing.assert_close(found.cls, backbone.features(images).cls.detach())
    assert not found.cls.requires_grad


def test_features_that_are_not_finite_are_refused() -> None:
    images = torch.zeros(4, 3, 2, 2)
    images[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="features of image 3"):
        extract_features(summing, batches=images.split(2), total=4, device=CPU)


@pytest.mark.parametrize(("arriving", "total"), [(4, 5), (0, 0)])
def test_the_number_of_images_is_checked(arriving: int, total: int) -> None:
    batches = [torch.zeros(1, 3, 2, 2)] * arriving
    with pytest.raises(ValueError, match=f"{arriving} images arrived but {total}"):
        extract_features(summing, batches=batches, total=total, device=CPU)
