import pytest
import torch
from torch import Tensor

from dinov2_core.vit.patch_embed import PatchGrid
from dinov2_core.vit.position import resample_positions


def cubic_weights(num_out: int, *, num_in: int, scale: float) -> Tensor:
    """Matrix [out, in] of bicubic interpolation (a = -0.75, half-pixel centres, clamped)."""
    weights = torch.zeros(num_out, num_in, dtype=torch.float64)
    for out in range(num_out):
        centre = (out + 0.5) / scale - 0.5
        first = int(centre // 1)
        for index in range(first - 1, first + 3):
            x, a = abs(centre - index), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[out, min(max(index, 0), num_in - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(7, 7), (20, 20), (3, 5), (4, 9)])
def test_resampling_equals_separable_cubic_convolution(
    offset: float, grid: tuple[int, int]
) -> None:
    positions = torch.randn(1, 17, 3, generator=torch.Generator().manual_seed(0))
    height, width = grid
    actual = resample_positions(
        positions, grid=PatchGrid(height=height, width=width), offset=offset, antialias=False
    )
    rows = cubic_weights(height, num_in=4, scale=(height + offset) / 4)
    columns = cubic_weights(width, num_in=4, scale=(width + offset) / 4)
    square = positions[0, 1:].double().view(4, 4, 3)
    expected = torch.einsum("hi,wj,ijd->hwd", rows, columns, square).flatten(0, 1).float()
    assert torch.equal(actual[:, :1], positions[:, :1])
    torch.testing.assert_close(actual[0, 1:], expected, atol=2e-6, rtol=1e-5)


def test_the_same_grid_comes_back_untouched() -> None:
    positions = torch.randn(1, 17, 3)
    grid = PatchGrid(height=4, width=4)
    assert resample_positions(positions, grid=grid, offset=0.1, antialias=True) is positions


def test_as_many_patches_in_another_shape_are_resampled() -> None:
    positions = torch.randn(1, 17, 3)
    grid = PatchGrid(height=2, width=8)
    resampled = resample_positions(positions, grid=grid, offset=0.0, antialias=False)
    assert resampled.shape == positions.shape
    assert not torch.equal(resampled, positions)


def test_antialiasing_changes_a_smaller_grid() -> None:
    positions = torch.randn(1, 17, 3)
    plain, smooth = (
        resample_positions(
            positions, grid=PatchGrid(height=2, width=2), offset=0.0, antialias=antialias
        )
        for antialias in (False, True)
    )
    assert not torch.allclose(plain, smooth)


def test_half_precision_is_resampled_in_float32() -> None:
    positions = torch.randn(1, 17, 3).bfloat16()
    grid = PatchGrid(height=7, width=7)
    actual = resample_positions(positions, grid=grid, offset=0.0, antialias=True)
    exact = resample_positions(positions.float(), grid=grid, offset=0.0, antialias=True)
    assert torch.equal(actual, exact.bfloat16())


def test_an_offset_that_changes_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"position_offset 1\.5 turns a grid of 7 x 7"):
        resample_positions(
            torch.zeros(1, 17, 3), grid=PatchGrid(height=7, width=7), offset=1.5, antialias=False
        )
