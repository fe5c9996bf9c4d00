from __future__ import annotations

import pytest

from dinov2_core.config.backbone import ARCHITECTURES, ArchitectureName, Backbone
from dinov2_core.config.objectives import Head
from dinov2_core.models import build_backbone, build_head


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_small", 22.06), ("vit_base", 86.58), ("vit_large", 304.37)]
)
def test_named_sizes_have_the_published_number_of_parameters(
    name: ArchitectureName, millions: float
) -> None:
    """Patch 14 at 518 pixels, MLP; counted on the reference implementation."""
    assert name in ARCHITECTURES
    import torch

    with torch.device("meta"):
        backbone = build_backbone(Backbone(architecture=name), image_size_pixels=518)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_head_has_the_sizes_of_its_settings() -> None:
    head = build_head(
        Head(num_prototypes=7, bottleneck_dim=3, hidden_dim=5, num_layers=2), in_dim=4
    )
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes["last_layer.weight_v"] == (7, 3)
    assert shapes["mlp.0.weight"] == (5, 4)
