"""Attention kernels against a softmax over the whole packed sequence with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_core.errors import SettingsError
from dinov2_core.vit.attention_kernels import (
    KERNELS,
    Kernel,
    choose_kernel,
    crop_starts,
    why_unavailable,
)
from dinov2_core.vit.packing import CropGroup

GROUPS = (CropGroup(num_crops=2, num_tokens=5), CropGroup(num_crops=3, num_tokens=3))
NUM_ROWS, NUM_HEADS, HEAD_DIM = 19, 2, 64
CPU = torch.device("cpu")


def packed(dtype: torch.dtype, *, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(NUM_ROWS, 3 * NUM_HEADS * HEAD_DIM, generator=generator)
    return rows.to(device, dtype).requires_grad_()


def masked_softmax(qkv: Tensor) -> Tensor:
    """Float64 attention over all rows, rows of other crops masked out."""
    crop_of_row = torch.tensor([0] * 5 + [1] * 5 + [2] * 3 + [3] * 3 + [4] * 3, device=qkv.device)
    heads = qkv.double().view(NUM_ROWS, 3, NUM_HEADS, HEAD_DIM).permute(1, 2, 0, 3)
    query, key, value = heads
    similarity = query @ key.transpose(1, 2) / HEAD_DIM**0.5
    similarity = similarity.masked_fill(crop_of_row[:, None] != crop_of_row, -torch.inf)
    return (similarity.softmax(-1) @ value).transpose(0, 1).flatten(1)


def attend(qkv: Tensor, kernel: Kernel) -> Tensor:
    return KERNELS[kernel](qkv.view(NUM_ROWS, 3, NUM_HEADS, HEAD_DIM), groups=GROUPS)


def assert_equals_masked_softmax(kernel: Kernel, qkv: Tensor, *, tolerance: float) -> None:
    weights = torch.randn(
        NUM_ROWS, NUM_HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1)
    )
    weights = weights.to(qkv.device)
    attended = attend(qkv, kernel)
    (gradient,) = torch.autograd.grad((attended * weights).sum(), qkv)
    expected = masked_softmax(qkv)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), qkv)

    assert attended.shape == (NUM_ROWS, NUM_HEADS * HEAD_DIM)
    assert attended.dtype == qkv.dtype
    for got, wanted in ((attended, expected), (gradient, expected_gradient)):
        torch.testing.assert_close(
            got.double(), wanted.double(), atol=tolerance, rtol=tolerance, check_dtype=False
        )


def test_groups_one_by_one_equal_masked_softmax() -> None:
    assert_equals_masked_softmax("per_group", packed(torch.float32), tolerance=2e-6)


def test_flex_equals_masked_softmax_where_a_cpu_can_run_it() -> None:
    with torch.no_grad():  # it has no backward pass on a CPU
        qkv = packed(torch.float32).detach()
        attended = attend(qkv, "flex")
    torch.testing.assert_close(attended.double(), masked_softmax(qkv), atol=2e-6, rtol=2e-6)


def test_bf16_on_a_cpu_equals_masked_softmax_within_its_precision() -> None:
    assert_equals_masked_softmax("per_group", packed(torch.bfloat16), tolerance=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "xformers", "flex", "per_group"])
def test_kernels_of_a_gpu_equal_masked_softmax(kernel: Kernel) -> None:
    qkv = packed(torch.bfloat16, device="cuda")
    assert why_unavailable(kernel, qkv.device, qkv.dtype) is None
    assert_equals_masked_softmax(kernel, qkv, tolerance=3e-2)


@pytest.mark.gpu
def test_a_gpu_takes_a_packed_kernel_in_half_precision_only() -> None:
    device = torch.device("cuda", 0)
    half, full = torch.bfloat16, torch.float32
    assert choose_kernel("fastest", device=device, dtype=half) in ("varlen", "xformers")
    assert choose_kernel("fastest", device=device, dtype=full) == "per_group"


def test_a_cpu_computes_group_by_group() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert choose_kernel("fastest", device=CPU, dtype=dtype) == "per_group"


@pytest.mark.parametrize("kernel", ["varlen", "xformers", "flex"])
def test_a_named_kernel_that_cannot_run_is_refused(kernel: Kernel) -> None:
    named = f"attention_kernel {kernel} does not run on cpu .* choose fastest, which is per_group"
    with pytest.raises(SettingsError, match=named):
        choose_kernel(kernel, device=CPU, dtype=torch.bfloat16)
    assert choose_kernel("per_group", device=CPU, dtype=torch.bfloat16) == "per_group"


def test_crops_start_where_the_one_before_ends() -> None:
    starts = crop_starts(GROUPS, device=CPU)
    assert starts.tolist() == [0, 5, 10, 13, 16, 19]
    assert starts.dtype == torch.int32
