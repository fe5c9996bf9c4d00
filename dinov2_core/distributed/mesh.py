"""Process group, device mesh and the exchange of small values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dinov2_core.errors import SettingsError

SHARD_DIMENSION = "shard"
"""Name of the mesh dimension that parameters are split over."""
REPLICATE_DIMENSION = "replicate"
"""Name of the mesh dimension that holds copies of the split parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all ranks."""

    rank: int
    """Of this process, from 0."""
    world_size: int
    """Processes in all."""
    device: torch.device
    """Of this process."""
    mesh: DeviceMesh
    """[world_size], dimension `shard`, or [num_replicas, ranks of a replica], dimensions
    `replicate` and `shard`: neighbouring ranks hold the shards of one replica."""

    @property
    def is_main_rank(self) -> bool:
        """Whether this process logs, reports and writes the shared files for all."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Values [n] of every rank as [world_size, n] on every rank. Collective."""
        if self.world_size == 1:
            return values[None]
        rows = values.new_empty(self.world_size * values.shape[0])
        dist.all_gather_into_tensor(rows, values.contiguous())
        return rows.view(self.world_size, -1)


@contextmanager
def process_group(*, timeout_seconds: float = 1800.0, num_replicas: int = 1) -> Iterator[Ranks]:
    """Join the process group of the ranks that torchrun started; left at the end.

    Reads RANK, LOCAL_RANK and WORLD_SIZE; without them the process is the only rank, on the same
    path. CUDA devices are used where there are any, with NCCL, else the CPU with gloo.

    Args:
        timeout_seconds: After this long a collective that some rank does not join fails.
        num_replicas: Copies of the parameters, each split over its share of the ranks.

    Raises:
        SettingsError: There are fewer CUDA devices than ranks on this machine, the ranks do not
            divide into so many replicas, or torchrun did not start them.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world_size)
    elif world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, timeout=timeout, rank=0, world_size=1)
    else:
        raise SettingsError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set; start the ranks with torchrun"
        )
    try:
        mesh = device_mesh(device, world_size=world_size, num_replicas=num_replicas)
        yield Ranks(rank=rank, world_size=world_size, device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()


def device_mesh(device: torch.device, *, world_size: int, num_replicas: int) -> DeviceMesh:
    """The mesh of `Ranks`: one dimension, or two with replicas.

    Raises:
        SettingsError: The ranks do not divide into so many replicas.
    """
    if num_replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=(SHARD_DIMENSION,))
    if world_size % num_replicas:
        raise SettingsError(
            f"{world_size} ranks do not divide into {num_replicas} replicas; set "
            f"topology.num_replicas to a divisor of {world_size}"
        )
    return init_device_mesh(
        device.type,
        (num_replicas, world_size // num_replicas),
        mesh_dim_names=(REPLICATE_DIMENSION, SHARD_DIMENSION),
    )


def is_local_main_rank() -> bool:
    """Whether this rank manages the files of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"local rank {local_rank} has no CUDA device ({torch.cuda.device_count()} found); "
            "set topology.processes_per_node to the number of devices of a node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
