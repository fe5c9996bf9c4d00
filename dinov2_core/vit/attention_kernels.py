"""Block-diagonal attention over packed crops, by whichever kernel the device has."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.device_kind import device_kind
from dinov2_core.vit.packing import CropGroup, split_rows

logger = logging.getLogger(__name__)

Kernel = Literal["varlen", "xformers", "flex", "per_group"]
"""Ways to compute attention; they differ in rounding only."""

PREFERENCE: tuple[Kernel, ...] = ("varlen", "xformers", "per_group")
"""What `fastest_kernel` tries on CUDA. One launch for all crops beats one per group; torch's own
kernel always fits the installed torch. The compiled `flex` is there to be named."""

MAX_PLAIN_SCORES = 1 << 26
"""Attention scores that may be held at once, 128 MiB in bfloat16."""


class KernelUnavailable(ValueError):
    """The named kernel does not run on this device with this type."""


class _Attend(Protocol):
    """Queries, keys and values [T, 3, heads, d] of packed crops to attended values [T, D]."""

    def __call__(self, qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor: ...


def attend(qkv: Tensor, *, groups: Sequence[CropGroup], num_heads: int, kernel: Kernel) -> Tensor:
    """Scaled dot-product attention of every crop with itself.

    Args:
        qkv: Queries, keys and values of the packed tokens [T, 3 D], head-major.
        groups: How the T rows fall into crops, in order.
        num_heads: Attention heads, divides D.
        kernel: How it is computed.

    Returns:
        Attended values [T, D] in the order of the rows.
    """
    heads = qkv.view(qkv.shape[0], 3, num_heads, -1)
    return _KERNELS[kernel](heads, groups=groups)


def fastest_kernel(device: torch.device, *, dtype: torch.dtype) -> Kernel:
    """The kernel to take where none is named.

    Packed kernels want half precision on CUDA; everything else is computed group by group.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "per_group"
    return next(kernel for kernel in PREFERENCE if why_unavailable(kernel, device, dtype) is None)


def check_kernel(kernel: Kernel, *, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a kernel that does not run here.

    Raises:
        KernelUnavailable: It does not; the message names one that does.
    """
    reason = why_unavailable(kernel, device, dtype)
    if reason is not None:
        raise KernelUnavailable(
            f"execution.attention_kernel {kernel} does not run on {device.type} with {dtype} "
            f"({reason}); choose fastest, which takes {fastest_kernel(device, dtype=dtype)} here"
        )


@functools.cache
def why_unavailable(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a kernel from a forward and backward pass over two small groups, or None."""
    groups = (CropGroup(num_crops=2, num_tokens=5), CropGroup(num_crops=1, num_tokens=3))
    qkv = torch.zeros(13, 3 * 64, device=device, dtype=dtype, requires_grad=True)
    try:
        attend(qkv, groups=groups, num_heads=1, kernel=kernel).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # a library says in its own way what it lacks
        logger.debug("attention kernel %s is not available", kernel, exc_info=True)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _per_group(qkv: Tensor, *, groups: Sequence[CropGroup]) -> Tensor:
    """Crops of a group have equal length, so that no mask is needed."""
    attended = []
    for rows, group in zip(split_rows(qkv, groups=groups), groups, strict=True):
        heads = rows.view(group.num_crops, group.num_tokens, *rows.shape[1:])
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [crops, heads, tokens, d]
        values = _attended(query, key, value)
        attended.append(values.transpose(1, 2).reshape(group.num_rows, -1))
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of queries, keys and values [crops, heads, tokens, d].

    The fused kernel's backward pass in bfloat16 on a CPU takes about ten times as long as two
    matrix products and a softmax, which are taken while their scores fit.
    """
    num_scores = query.shape[:-1].numel() * key.shape[-2]
    is_cpu_bf16 = device_kind(query) == "cpu" and query.dtype == torch.bfloat16
    if is_cpu_bf16 and num_scores <= MAX_PLAIN_SCORES:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return torch.softmax(scores, dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


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
    """Kept, since it copies the lengths to the device; stochastic depth keeps sizes constant."""
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


_KERNELS: dict[Kernel, _Attend] = {
    "varlen": _varlen,
    "xformers": _xformers,
    "flex": _flex,
    "per_group": _per_group,
}
