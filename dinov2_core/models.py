"""Builds networks from settings."""

from __future__ import annotations

from dinov2_core.config.backbone import Backbone
from dinov2_core.config.objectives import Head
from dinov2_core.heads import DINOHead
from dinov2_core.vit.transformer import VisionTransformer


def build_backbone(backbone: Backbone, *, image_size_pixels: int) -> VisionTransformer:
    """The vision transformer that the settings describe, with learned positions of that size."""
    dimensions = backbone.dimensions
    return VisionTransformer(
        image_size_pixels=image_size_pixels,
        patch_size_pixels=backbone.patch_size_pixels,
        num_channels=backbone.num_channels,
        embed_dim=dimensions.embed_dim,
        depth=dimensions.depth,
        num_heads=dimensions.num_heads,
        mlp_ratio=dimensions.mlp_ratio,
        feed_forward=backbone.feed_forward,
        num_register_tokens=backbone.num_register_tokens,
        drop_path_rate=backbone.drop_path_rate,
        layer_scale=backbone.layer_scale,
        position_offset=backbone.position_offset,
        position_antialias=backbone.position_antialias,
    )


def build_head(head: Head, *, in_dim: int) -> DINOHead:
    """The projection head that the settings describe, on tokens of width `in_dim`."""
    return DINOHead(
        in_dim=in_dim,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        num_prototypes=head.num_prototypes,
        num_layers=head.num_layers,
    )
