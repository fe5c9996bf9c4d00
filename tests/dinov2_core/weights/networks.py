"""Tiny random networks of every kind of architecture that DINOv2 has."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.vit.transformer import VisionTransformer

KINDS: list[tuple[FeedForward, int]] = [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)]


def network(
    feed_forward: FeedForward, num_register_tokens: int, *, seed: int = 0
) -> VisionTransformer:
    """A network in eval mode whose every weight is random, norms and scales included."""
    module = VisionTransformer(
        image_size_pixels=16,
        patch_size_pixels=4,
        embed_dim=24,
        depth=3,
        num_heads=2,
        feed_forward=feed_forward,
        num_register_tokens=num_register_tokens,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.eval()


def weights_of(module: VisionTransformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


@torch.no_grad()
def tokens_of(module: VisionTransformer) -> Tensor:
    """Tokens [2, 1 + R + N, D] of fixed images."""
    features = module.features(images())
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
