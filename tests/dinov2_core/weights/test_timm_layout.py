"""timm_layout: timm's networks and ours give the same tokens, whichever was there first."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.weights.timm_layout import from_timm, to_timm
from tests.dinov2_core.weights.networks import KINDS, images, network, tokens_of, weights_of


def timm_network(feed_forward: FeedForward, num_registers: int) -> Any:
    """timm's DINOv2 network of the tiny size, every weight random."""
    size = "giant" if feed_forward == "swiglu" else "small"
    registers = "reg4_" if num_registers else ""
    module = timm.create_model(
        f"vit_{size}_patch14_{registers}dinov2",
        pretrained=False,
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=2,
        mlp_ratio=128.5 / 24 if feed_forward == "swiglu" else 4.0,  # gated width 64, packed
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module.eval()


@pytest.mark.parametrize(("feed_forward", "num_registers"), KINDS)
@torch.no_grad()
def test_timms_network_gives_our_tokens_both_ways(
    feed_forward: FeedForward, num_registers: int
) -> None:
    theirs, ours = timm_network(feed_forward, num_registers), network(feed_forward, num_registers)
    theirs.load_state_dict(to_timm(weights_of(ours)), strict=True)
    torch.testing.assert_close(
        theirs.forward_features(images()), tokens_of(ours), atol=1e-5, rtol=1e-5
    )

    theirs, ours = timm_network(feed_forward, num_registers), network(feed_forward, num_registers)
    expected = theirs.forward_features(images())
    incompatible = ours.load_state_dict(from_timm(theirs.state_dict()), strict=False)
    assert incompatible.missing_keys == ["mask_token"]
    assert not incompatible.unexpected_keys
    torch.testing.assert_close(tokens_of(ours), expected, atol=1e-5, rtol=1e-5)


def test_positions_that_include_the_cls_token_stay() -> None:
    weights = {"reg_token": torch.ones(1, 4, 2), "pos_embed": torch.ones(1, 10, 2)}
    assert from_timm(weights)["pos_embed"].shape == (1, 10, 2)
    assert from_timm(weights | {"pos_embed": torch.ones(1, 9, 2)})["pos_embed"].shape == (1, 10, 2)
    assert "register_tokens" in from_timm({"reg_token": torch.ones(1, 4, 2)})
