from typing import Any

import torch

from dinov2_core.losses.precision import bfloat16_units, without_autocast


def test_products_inside_keep_float32() -> None:
    factor = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (factor @ factor).dtype == torch.bfloat16
        with without_autocast(factor.device):
            assert (factor @ factor).dtype == torch.float32


def test_devices_without_autocast_are_left_alone() -> None:
    with without_autocast(torch.device("meta")):
        assert torch.ones(2, device="meta").dtype == torch.float32


def test_bfloat16_units_are_exact_for_bfloat16_factors_and_left_as_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).bfloat16().float() for _ in range(2))
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009
    before = settings.fp32_precision
    with bfloat16_units():
        assert settings.fp32_precision == "bf16"
        product = left @ right
    assert settings.fp32_precision == before
    expected = (left.double() @ right.double()).float()
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-5)
