import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_core.vit.feed_forward import FeedForward, Mlp, SwiGlu, feed_forward


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


def plain(module: Mlp | SwiGlu, tokens: torch.Tensor) -> torch.Tensor:
    """The same with every result kept by autograd."""
    if isinstance(module, Mlp):
        return module.fc2(F.gelu(module.fc1(tokens)))
    gate, value = module.w12(tokens).chunk(2, dim=-1)
    return module.w3(F.silu(gate) * value)


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_what_is_computed_again_gives_autograds_gradients(kind: FeedForward) -> None:
    generator = torch.Generator().manual_seed(0)
    module = feed_forward(kind, embed_dim=8, hidden_dim=24)
    tokens = torch.randn(5, 8, generator=generator, requires_grad=True)
    weights = torch.randn(5, 8, generator=generator)
    inputs = [tokens, *module.parameters()]
    actual = torch.autograd.grad((module(tokens) * weights).sum(), inputs)
    expected = torch.autograd.grad((plain(module, tokens) * weights).sum(), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_only_the_input_of_the_activation_is_kept(kind: FeedForward) -> None:
    module = feed_forward(kind, embed_dim=8, hidden_dim=24)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x
    ):
        module(torch.randn(5, 8))
    wide = [shape for shape in kept if shape[0] == 5 and shape[1] > 8]
    assert len(wide) == 1


@pytest.mark.parametrize(("hidden_dim", "gated_dim"), [(4096, 2736), (6144, 4096), (256, 176)])
def test_swiglu_width_is_the_references(hidden_dim: int, gated_dim: int) -> None:
    swiglu = feed_forward("swiglu", embed_dim=8, hidden_dim=hidden_dim)
    assert isinstance(swiglu, SwiGlu)
    assert swiglu.w3.in_features == gated_dim
    assert swiglu.w12.out_features == 2 * gated_dim
