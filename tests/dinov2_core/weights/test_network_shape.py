"""network_shape: shapes say what was built."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.weights.network_shape import NetworkShape, shape_of
from tests.dinov2_core.weights.networks import KINDS, network, weights_of


@pytest.mark.parametrize(("feed_forward", "num_registers"), KINDS)
def test_shapes_tell_the_architecture(feed_forward: FeedForward, num_registers: int) -> None:
    weights = weights_of(network(feed_forward, num_registers))
    assert shape_of(weights, source="here") == NetworkShape(
        embed_dim=24,
        depth=3,
        patch_size_pixels=4,
        num_channels=3,
        feed_forward=feed_forward,
        hidden_dim=96 if feed_forward == "mlp" else 64,
        num_register_tokens=num_registers,
    )


def test_what_is_no_vision_transformer_is_told() -> None:
    with pytest.raises(ValueError, match=r"here holds no vision transformer .* begins with conv1"):
        shape_of({"conv1.weight": torch.ones(1)}, source="here")
    with pytest.raises(ValueError, match="begins with nothing"):
        shape_of({}, source="here")
