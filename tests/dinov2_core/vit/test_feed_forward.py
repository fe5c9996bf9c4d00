import math

import pytest
import torch

from dinov2_core.vit.feed_forward import Mlp, SwiGlu, feed_forward


def test_mlp_uses_the_exact_gelu() -> None:
    mlp = Mlp(embed_dim=4, hidden_dim=8)
    tokens = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    hidden = mlp.fc1(tokens)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(mlp(tokens), mlp.fc2(gelu))


def test_swiglu_gates_the_second_half_with_the_first() -> None:
    swiglu = SwiGlu(embed_dim=4, hidden_dim=16)
    tokens = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    hidden = swiglu.w12(tokens)
    gate, value = hidden[:, :16], hidden[:, 16:]
    torch.testing.assert_close(swiglu(tokens), swiglu.w3(gate * torch.sigmoid(gate) * value))


@pytest.mark.parametrize(("hidden_dim", "gated_dim"), [(4096, 2736), (6144, 4096), (256, 176)])
def test_swiglu_width_is_the_references(hidden_dim: int, gated_dim: int) -> None:
    swiglu = feed_forward("swiglu", embed_dim=8, hidden_dim=hidden_dim)
    assert isinstance(swiglu, SwiGlu)
    assert swiglu.w3.in_features == gated_dim
    assert swiglu.w12.out_features == 2 * gated_dim
