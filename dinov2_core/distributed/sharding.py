"""What is applied to a module from outside: activation checkpointing, compilation, sharding."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How a module is spread over the ranks and run."""

    precision: Literal["fp32", "bf16"]
    """Type of gathered parameters and of the computation; shards and reductions stay fp32."""
    recomputes_activations: bool = False
    """Keep only the inputs of blocks for the backward pass; parameter names do not change."""
    compiles_blocks: bool = False
    """Compile each block in place; parameter names do not change."""


def shard_trained(
    parts: Iterable[nn.Module],
    *,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    sharding: Sharding,
) -> None:
    """Split modules that get gradients: checkpoint, compile, then shard, block by block.

    Blocks give their gathered parameters back after the forward pass when there is somebody to
    gather from; a part (backbone or head) keeps its few own ones until the backward pass, which
    follows at once.

    Args:
        parts: Backbone and heads, each called on its own; every part becomes a root.
        blocks: Modules inside the parts that are gathered one by one.
        mesh: One dimension to shard over; two would be replicate x shard.
        sharding: Precision and options.
    """
    policy = _policy(sharding)
    for block in blocks:
        if sharding.recomputes_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if sharding.compiles_blocks:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=mesh.size() > 1)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def shard_averaged(
    parts: Iterable[nn.Module],
    *,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    sharding: Sharding,
) -> None:
    """Split modules that only run forward and whose shards are changed in between (a teacher).

    Every part gives its gathered parameters back after each forward pass. A root does not by
    default, and without a backward pass it never would: the next forward pass would silently use
    the parameters from before the moving average.

    Args:
        parts: Backbone and heads, each called on its own; every part becomes a root.
        blocks: Modules inside the parts that are gathered one by one.
        mesh: One dimension to shard over; two would be replicate x shard.
        sharding: Precision and options; nothing is recomputed without a backward pass.
    """
    policy = _policy(sharding)
    for block in blocks:
        if sharding.compiles_blocks:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _policy(sharding: Sharding) -> MixedPrecisionPolicy:
    if sharding.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
