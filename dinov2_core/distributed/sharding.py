"""What is applied to a module from outside: activation checkpointing, compilation, sharding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, assert_never

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dinov2_core.config.execution import Execution, Precision, Recomputation
from dinov2_core.distributed.mesh import SHARD_DIMENSION

_KEPT_OPERATORS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Costly to compute; everything else in a block is cheap and large."""

_ATTENTION_LIBRARIES = frozenset({"torch_attn", "xformers", "xformers_flash", "xformers_flash3"})
"""Namespaces of packed attention kernels, which a block calls in its forward pass only."""


def shard_student(
    parts: Iterable[nn.Module],
    *,
    blocks: nn.ModuleList,
    mesh: DeviceMesh,
    precision: Precision,
    execution: Execution,
) -> None:
    """Split modules that get gradients: checkpoint, compile, then shard, block by block.

    Blocks free their gathered parameters after the forward pass when there are other ranks to
    gather from; a part (backbone or head) keeps its few own ones until the backward pass, which
    follows at once. Names of parameters do not change.

    Args:
        parts: Backbone and heads, each called on its own; every part becomes a root.
        blocks: Modules inside the parts that are gathered one by one, in the order they run.
        mesh: One dimension to shard over, or two: replicate x shard.
        precision: Type of gathered parameters and of the computation; shards and reductions of
            gradients stay fp32.
        execution: Whether blocks are recomputed in the backward pass and compiled.
    """
    shard = partial(fully_shard, mesh=mesh, mp_policy=_policy(precision))
    for block in blocks:
        _recompute(block, activations=execution.recomputes_activations)
        _compile(block, execution=execution)
        shard(block, reshard_after_forward=mesh[SHARD_DIMENSION].size() > 1)
    for part in parts:
        shard(part, reshard_after_forward=False)
    if mesh.device_type == "cuda":
        prefetch(list(blocks))


def shard_teacher(
    parts: Iterable[nn.Module],
    *,
    blocks: nn.ModuleList,
    mesh: DeviceMesh,
    precision: Precision,
    execution: Execution,
) -> None:
    """Split modules that only run forward and whose shards change in between, by the EMA.

    Every part frees its gathered parameters after each forward pass. A root does not by default,
    and without a backward pass it never would: the next forward pass would silently use the
    parameters from before the moving average.

    Args:
        parts: Backbone and heads, each called on its own; every part becomes a root.
        blocks: Modules inside the parts that are gathered one by one, in the order they run.
        mesh: One dimension to shard over, or two: replicate x shard.
        precision: Type of gathered parameters and of the computation.
        execution: Whether blocks are compiled; nothing is recomputed without a backward pass.
    """
    shard = partial(fully_shard, mesh=mesh, mp_policy=_policy(precision))
    for block in blocks:
        _compile(block, execution=execution)
        shard(block, reshard_after_forward=True)
    for part in parts:
        shard(part, reshard_after_forward=True)
    if mesh.device_type == "cuda":
        prefetch(list(blocks))


def prefetch(blocks: Sequence[nn.Module]) -> None:
    """Gather the next block's parameters while a block computes, forward and backward.

    Args:
        blocks: Sharded modules in the order they run.
    """
    sharded = [block for block in blocks if isinstance(block, FSDPModule)]
    for block, following in itertools.pairwise(sharded):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def reduce_gradients(parts: Iterable[nn.Module], *, enabled: bool) -> None:
    """Whether the coming backward passes send gradients to their shards or collect them whole.

    Args:
        parts: Modules that `shard_student` made roots; others are left alone.
        enabled: False for all but the last of several backward passes of a step.
    """
    for part in parts:
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled)


def _recompute(block: nn.Module, *, activations: Recomputation) -> None:
    match activations:
        case "none":
            return
        case "full":
            options: dict[str, Any] = {}
        case "selective":
            options = {"context_fn": _selective_contexts}
        case _:
            assert_never(activations)
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def _selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    contexts: tuple[AbstractContextManager[None], AbstractContextManager[None]] = (
        create_selective_checkpoint_contexts(_keep_costly)  # type: ignore[no-untyped-call]
    )
    return contexts


def _keep_costly(_context: object, operator: object, *_args: object, **_kw: object) -> object:
    library = getattr(operator, "namespace", "")
    is_kept = operator in _KEPT_OPERATORS or library in _ATTENTION_LIBRARIES
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _compile(block: nn.Module, *, execution: Execution) -> None:
    """Compile the computation without the hooks that gather parameters; blocks share the code."""
    if execution.compiles_blocks:
        block.forward = torch.compile(block.forward)


def _policy(precision: Precision) -> MixedPrecisionPolicy:
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
