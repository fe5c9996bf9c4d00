from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dinov2_core.vit.packing import CropGroup
from dinov2_core.vit.stochastic_depth import add_residual

GROUPS = (CropGroup(num_crops=6, num_tokens=3), CropGroup(num_crops=10, num_tokens=2))


def row_mean_branch(tokens: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
    """Depends on the crop a row belongs to, so that a wrong row shows."""
    parts, start = [], 0
    for group in groups:
        crops = tokens[start : start + group.num_rows].view(group.num_crops, group.num_tokens, -1)
        parts.append((crops.square() + crops.mean(1, keepdim=True)).flatten(0, 1))
        start += group.num_rows
    return torch.cat(parts)


def test_subset_equals_a_loop_over_crops_with_the_references_random_order() -> None:
    tokens = torch.randn(38, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        actual = add_residual(tokens, branch=row_mean_branch, groups=GROUPS, drop_rate=0.3)
        torch.manual_seed(3)
        kept = [torch.randperm(6)[:4], torch.randperm(10)[:7]]  # int(6 * .7), int(10 * .7)

    expected = tokens.clone()
    for first, group, crops in zip((0, 18), GROUPS, kept, strict=True):
        for crop in crops.tolist():
            rows = slice(first + crop * group.num_tokens, first + (crop + 1) * group.num_tokens)
            one = (CropGroup(num_crops=1, num_tokens=group.num_tokens),)
            scale = group.num_crops / len(crops)
            expected[rows] = expected[rows] + scale * row_mean_branch(tokens[rows], groups=one)

    torch.testing.assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual.square().sum(), tokens)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), tokens)
    torch.testing.assert_close(grad, expected_grad)


def test_rate_zero_computes_all_crops_and_draws_nothing() -> None:
    tokens = torch.randn(38, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    actual = add_residual(tokens, branch=row_mean_branch, groups=GROUPS, drop_rate=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(actual, tokens + row_mean_branch(tokens, groups=GROUPS))


@pytest.mark.parametrize(("drop_rate", "num_kept"), [(0.1, 5), (0.3, 4), (0.5, 3), (0.99, 1)])
def test_at_least_one_crop_is_kept(drop_rate: float, num_kept: int) -> None:
    tokens = torch.zeros(18, 4)
    with torch.random.fork_rng():
        summed = add_residual(
            tokens,
            branch=lambda tokens, groups: torch.ones_like(tokens),
            groups=GROUPS[:1],
            drop_rate=drop_rate,
        )
    crops = summed.view(6, 3 * 4)
    assert (crops != 0).all(dim=1).sum() == num_kept
    assert set(crops.unique().tolist()) == {0.0, torch.tensor(6 / num_kept).item()}
