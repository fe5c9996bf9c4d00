"""Builds networks from settings."""

from __future__ import annotations

from dinov2_core.backbones import BackboneNetwork, build_network
from dinov2_core.config.backbone import Backbone
from dinov2_core.config.objectives import Head
from dinov2_core.heads import DINOHead


def build_backbone(backbone: Backbone, *, image_size_pixels: int) -> BackboneNetwork:
    """The network that the settings describe, with learned positions of that size."""
    return build_network(backbone.network_arguments(image_size_pixels=image_size_pixels))


def build_head(head: Head, *, in_dim: int) -> DINOHead:
    """The projection head that the settings describe, on tokens of width `in_dim`."""
    return DINOHead(
        in_dim=in_dim,
        hidden_dim=head.hidden_dim,
        bottleneck_dim=head.bottleneck_dim,
        num_prototypes=head.num_prototypes,
        num_layers=head.num_layers,
    )
