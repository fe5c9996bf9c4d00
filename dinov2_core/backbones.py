"""Every kind of backbone network, built from plain values: a registered model carries this file.

To add a kind: its settings in `config.backbone`, its network in a package beside `vit`, its entry
here, and, where other programs have it, their names for its weights in `weights.export`. Arguments
of a network are the fields of its settings, among them embed_dim, num_channels, patch_size_pixels.
A network has `blocks`, `init_weights(generator)`, `forward(crop_groups, masks=)` and
`features(images)` as `VisionTransformer` has them; layer-wise learning rates find its layers by the
names `patch_embed` and `blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinov2_core.vit.transformer import VisionTransformer

BackboneNetwork = VisionTransformer
"""Any of them; a union once there are two."""


def build_network(arguments: Mapping[str, Any]) -> BackboneNetwork:
    """The network of `Backbone.network_arguments`.

    Raises:
        TypeError: An argument is unknown or missing.
        ValueError: Sizes do not fit each other.
    """
    return VisionTransformer(**arguments)
