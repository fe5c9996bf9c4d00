import torch

from dinov2_core.vit.block import Block, LayerScale
from dinov2_core.vit.packing import CropGroup


def make_block(*, drop_path_rate: float) -> Block:
    block = Block(
        embed_dim=16,
        num_heads=2,
        hidden_dim=32,
        feed_forward_kind="mlp",
        drop_path_rate=drop_path_rate,
        layer_scale=0.5,
    )
    block.ls1.init_weights()
    block.ls2.init_weights()
    return block


def test_block_is_prenorm_with_scaled_residuals() -> None:
    block = make_block(drop_path_rate=0.4).eval()
    groups = (CropGroup(num_crops=4, num_tokens=3),)
    tokens = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    middle = tokens + 0.5 * block.attn(block.norm1(tokens), groups=groups)
    expected = middle + 0.5 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(tokens, groups=groups), expected)
    assert block.norm1.eps == block.norm2.eps == 1e-6


def test_dropped_crops_differ_between_the_two_branches() -> None:
    block = make_block(drop_path_rate=0.5).train()
    groups = (CropGroup(num_crops=32, num_tokens=1),)
    tokens = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = block(tokens, groups=groups)
        torch.manual_seed(0)
        attention, feed_forward = torch.randperm(32)[:16], torch.randperm(32)[:16]
    touched = set(attention.tolist()) | set(feed_forward.tolist())
    changed = (output != tokens).any(1).nonzero().flatten().tolist()
    assert set(changed) == touched
    assert 16 < len(touched) < 32


def test_layer_scale_multiplies_channels() -> None:
    scale = LayerScale(embed_dim=4, initial_value=0.25)
    scale.init_weights()
    assert torch.equal(scale(torch.ones(2, 4)), torch.full((2, 4), 0.25))
