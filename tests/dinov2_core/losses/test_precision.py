import torch

from dinov2_core.losses.precision import without_autocast


def test_products_inside_keep_float32() -> None:
    factor = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (factor @ factor).dtype == torch.bfloat16
        with without_autocast(factor.device):
            assert (factor @ factor).dtype == torch.float32


def test_devices_without_autocast_are_left_alone() -> None:
    with without_autocast(torch.device("meta")):
        assert torch.ones(2, device="meta").dtype == torch.float32
