import pytest
import torch

from dinov2_core.heads import DINOHead


def make_head(**changes: int) -> DINOHead:
    sizes = {"in_dim": 8, "hidden_dim": 16, "bottleneck_dim": 6, "num_prototypes": 10}
    return DINOHead(**(sizes | changes))


def test_logits_are_those_of_a_weight_normalised_linear_layer() -> None:
    head = make_head()
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 10, bias=False))
    with torch.no_grad():
        head.last_layer.weight_g.copy_(torch.rand(10, 1) + 0.5)
        linear.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        linear.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    tokens = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    output = head(tokens)
    bottleneck = head.mlp(tokens)
    unit = bottleneck / bottleneck.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(output.features, unit)
    torch.testing.assert_close(output.logits(), linear(unit))
    output.logits().square().sum().backward()
    expected = linear(unit.detach()).square().sum()
    direction = linear.parametrizations.weight.original1
    (grad,) = torch.autograd.grad(expected, direction)
    torch.testing.assert_close(head.last_layer.weight_v.grad, grad)


def test_parameter_names_are_the_references() -> None:
    shapes = {name: tuple(value.shape) for name, value in make_head().state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (16, 8),
        "mlp.0.bias": (16,),
        "mlp.2.weight": (16, 16),
        "mlp.2.bias": (16,),
        "mlp.4.weight": (6, 16),
        "mlp.4.bias": (6,),
        "last_layer.weight_g": (10, 1),
        "last_layer.weight_v": (10, 6),
    }


def test_initial_prototypes_have_length_one() -> None:
    head = make_head()
    torch.testing.assert_close(head.prototypes().norm(dim=1), torch.ones(10))
    assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1))
    assert head.last_layer.weight_v.abs().max() <= 6**-0.5


def test_every_parameter_is_initialised_after_the_meta_device() -> None:
    with torch.device("meta"):
        head = make_head()
    head.to_empty(device="cpu")
    head.init_weights(torch.Generator().manual_seed(0))
    again = make_head()
    again.init_weights(torch.Generator().manual_seed(0))
    for name, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_head_may_be_one_layer() -> None:
    assert make_head(num_layers=1)(torch.randn(2, 8)).features.shape == (2, 6)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers 0 leaves no layer"):
        make_head(num_layers=0)


def test_half_precision_features_are_normalised_in_float32() -> None:
    head = make_head().bfloat16()
    output = head(torch.randn(5, 8).bfloat16())
    assert output.features.dtype == output.prototypes.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.features.float().norm(dim=-1), torch.ones(5), atol=1e-2, rtol=0
    )
