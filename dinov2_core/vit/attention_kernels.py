"""Kernels that compute attention over all packed crops in one launch, where a device has them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinov2_core.errors import SettingsError
from dinov2_core.vit.attention import Attend, Attention, attend_per_group
from dinov2_core.vit.packing import CropGroup

logger = logging.getLogger(__name__)

Kernel = Literal["varlen", "xformers", "flex", "per_group"]
"""Ways to compute attention; they differ in rounding only."""

PREFERENCE: tuple[Kernel, ...] = ("varlen", "xformers", "per_group")
"""What `fastest` tries on CUDA. One launch for all crops beats one per group; torch's own
kernel always fits the installed torch. The compiled `flex` runs only where it is named."""


def use_kernel(network: nn.Module, kernel: Kernel) -> None:
    """Let every attention of a network be computed by a kernel that runs there."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.attend = KERNELS[kernel]


def choose_kernel(
    named: Kernel | Literal["fastest"], *, device: torch.device, dtype: torch.dtype
) -> Kernel:
    """The named kernel, or the fastest that runs on a device.

    Packed kernels need half precision on CUDA; everything else is computed group by group.

    Raises:
        SettingsError: The named one does not run there; the message names one that does.
    """
    if named != "fastest":
        _check_kernel(named, device=device, dtype=dtype)
        return named
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "per_group"
    return next(kernel for kernel in PREFERENCE if why_unavailable(kernel, device, dtype) is None)


def _check_kernel(kernel: Kernel, *, device: torch.device, dtype: torch.dtype) -> None:
    reason = why_unavailable(kernel, device, dtype)
    if reason is not None:
        fastest = choose_kernel("fastest", device=device, dtype=dtype)
        raise SettingsError(
            f"execution.attention_kernel {kernel} does not run on {device.type} with {dtype} "
            f"({reason}); choose fastest, which is {fastest} here"
        )


@functools.cache
def why_unavailable(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a kernel from a forward and backward pass over two small groups, or None."""
    groups = (CropGroup(num_crops=2, num_tokens=5), CropGroup(num_crops=1, num_tokens=3))
    qkv = torch.zeros(13, 3, 1, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        KERNELS[kernel](qkv, groups=groups).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # each library reports in its own way what it lacks
        logger.debug("attention kernel %s is not available", kernel, exc_info=True)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _varlen(qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
    """Flash attention over sequences of different length in one launch."""
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    starts = crop_starts(groups, device=qkv.device)
    longest = max(group.num_tokens for group in groups)
    query, key, value = qkv.unbind(1)
    attended = varlen_attn(query, key, value, starts, starts, longest, longest)
    assert isinstance(attended, Tensor)  # no auxiliary output was asked for
    return attended.flatten(1)


def crop_starts(groups: Sequence[CropGroup], *, device: torch.device) -> Tensor:
    """First row of every crop of the packed sequence, and the end of the last, int32 [C + 1]."""
    starts, first_row = [], 0
    for group in groups:
        end = first_row + group.num_rows
        starts.append(
            torch.arange(first_row, end, group.num_tokens, device=device, dtype=torch.int32)
        )
        first_row = end
    return torch.cat([*starts, torch.full((1,), first_row, device=device, dtype=torch.int32)])


def _xformers(qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
    """Xformers' memory-efficient attention under a block-diagonal mask."""
    operators = import_module("xformers.ops")  # extra `gpu`
    mask = _block_diagonal_mask(tuple(groups), qkv.device)
    query, key, value = qkv.unsqueeze(0).unbind(2)  # [1, T, heads, d]
    attended: Tensor = operators.memory_efficient_attention(query, key, value, attn_bias=mask)
    return attended.squeeze(0).flatten(1)


@functools.lru_cache(maxsize=64)
def _block_diagonal_mask(groups: tuple[CropGroup, ...], device: torch.device) -> Any:
    """Cached, since it copies the lengths to the device; stochastic depth keeps sizes constant."""
    masks = import_module("xformers.ops.fmha").attn_bias
    lengths = [group.num_tokens for group in groups for _ in range(group.num_crops)]
    return masks.BlockDiagonalMask.from_seqlens(lengths, device=device)


def _flex(qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
    """Torch's flex attention, compiled on CUDA, with the crop of every row as the mask."""
    from torch.nn.attention.flex_attention import flex_attention

    operator = _compiled_flex() if qkv.device.type == "cuda" else flex_attention
    query, key, value = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # [1, heads, T, d]
    mask = _crop_mask(tuple(groups), qkv.device)
    attended: Tensor = operator(query, key, value, block_mask=mask)
    return attended.squeeze(0).transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=64)
def _crop_mask(groups: tuple[CropGroup, ...], device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    starts = crop_starts(groups, device=device)
    num_rows = sum(group.num_rows for group in groups)
    rows = torch.arange(num_rows, device=device, dtype=torch.int32)
    crops = torch.searchsorted(starts, rows, right=True)

    def same_crop(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return crops[query] == crops[key]

    return create_block_mask(same_crop, None, None, num_rows, num_rows, device=device)


KERNELS: dict[Kernel, Attend] = {
    "varlen": _varlen,
    "xformers": _xformers,
    "flex": _flex,
    "per_group": attend_per_group,
}
