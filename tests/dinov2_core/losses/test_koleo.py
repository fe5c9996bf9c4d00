import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.koleo import koleo_loss


def naive_koleo(features: Tensor) -> Tensor:
    """Exact distances of every pair, in float64."""
    points = F.normalize(features.double(), dim=1)
    terms = []
    for i in range(len(points)):
        others = torch.cat([points[:i], points[i + 1 :]])
        terms.append(-torch.log((points[i] - others).norm(dim=1).min() + 1e-8))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("neighbours", ["rank", "global_batch"])
def test_loss_and_gradient_equal_a_loop_over_all_pairs(neighbours: str) -> None:
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, expected = koleo_loss(features, neighbours=neighbours), naive_koleo(features)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(loss, features)
    (naive_grad,) = torch.autograd.grad(expected, features)
    torch.testing.assert_close(grad, naive_grad, atol=1e-6, rtol=1e-5)


def test_duplicates_stay_finite_and_do_not_drown_the_others() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    features[1] = features[0]
    features.requires_grad_()
    loss = koleo_loss(features, neighbours="rank")
    loss.backward()
    assert features.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
    assert features.grad.norm() < 10


@pytest.mark.parametrize("num_features", [0, 1])
def test_fewer_than_two_features_have_no_neighbour(num_features: int) -> None:
    features = torch.randn(num_features, 5, requires_grad=True)
    loss = koleo_loss(features, neighbours="rank")
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_half_precision_is_computed_in_float32() -> None:
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(features, neighbours="rank")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), naive_koleo(features), atol=0, rtol=1e-5)


def test_length_of_features_does_not_matter() -> None:
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    scaled = features * torch.linspace(0.5, 40, 9)[:, None]
    torch.testing.assert_close(
        koleo_loss(features, neighbours="rank"), koleo_loss(scaled, neighbours="rank")
    )
