"""architecture: shapes show the settings of a network."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.errors import InputError
from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.weights.architecture import settings_of
from tests.dinov2_core.weights.networks import KINDS, network, weights_of


@pytest.mark.parametrize(("feed_forward", "num_registers"), KINDS)
def test_shapes_show_the_settings(feed_forward: FeedForward, num_registers: int) -> None:
    weights = weights_of(network(feed_forward, num_registers))
    assert settings_of(weights, source="here") == {
        "embed_dim": 24,
        "depth": 3,
        "patch_size_pixels": 4,
        "num_channels": 3,
        "feed_forward": feed_forward,
        "hidden_dim": 96 if feed_forward == "mlp" else 64,
        "num_register_tokens": num_registers,
    }


def test_other_networks_are_refused() -> None:
    with pytest.raises(InputError, match=r"here holds no vision transformer .* begins with conv1"):
        settings_of({"conv1.weight": torch.ones(1)}, source="here")
    with pytest.raises(InputError, match="begins with nothing"):
        settings_of({}, source="here")
