import pytest
import torch

from dinov2_core.vit.attention import Attention
from dinov2_core.vit.packing import CropGroup


def test_packed_attention_equals_masked_softmax_over_the_whole_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = Attention(embed_dim=16, num_heads=2)
    groups = (CropGroup(num_crops=2, num_tokens=5), CropGroup(num_crops=3, num_tokens=3))
    tokens = torch.randn(19, 16, generator=generator)
    crop_of_row = torch.tensor([0] * 5 + [1] * 5 + [2] * 3 + [3] * 3 + [4] * 3)

    query, key, value = attention.qkv(tokens).view(19, 3, 2, 8).permute(1, 2, 0, 3)
    similarity = query @ key.transpose(1, 2) / 8**0.5
    similarity[:, crop_of_row[:, None] != crop_of_row] = -torch.inf
    expected = attention.proj((similarity.softmax(-1) @ value).transpose(0, 1).flatten(1))

    torch.testing.assert_close(attention(tokens, groups=groups), expected, atol=1e-6, rtol=1e-5)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="embed_dim 16 is not divisible by num_heads 3"):
        Attention(embed_dim=16, num_heads=3)
