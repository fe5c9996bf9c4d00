"""Settings of ranks: on how many processes a stage works."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dinov2_core.config.frozen import Frozen


class Topology(Frozen):
    """Processes that do a stage's work together."""

    num_nodes: int = Field(1, ge=1)
    """Machines or pods."""
    processes_per_node: int = Field(1, ge=1)
    """Ranks on each, one per GPU where there are GPUs."""
    num_replicas: int = Field(1, ge=1)
    """Copies of the model that is trained; each is split (FSDP) over world_size / num_replicas
    neighbouring ranks. More than 1 keeps the gathering of parameters inside a node (hybrid
    sharding)."""
    threads_per_process: int = Field(2, ge=1)
    """CPU threads of each rank for arithmetic."""
    loader_threads: int = Field(2, ge=1)
    """Threads of each rank that read and decode images."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.processes_per_node

    @model_validator(mode="after")
    def _replicas_divide_world(self) -> Self:
        if self.world_size % self.num_replicas:
            raise ValueError(
                f"num_replicas {self.num_replicas} does not divide {self.world_size} ranks "
                f"(num_nodes {self.num_nodes} x processes_per_node {self.processes_per_node}); "
                f"choose a divisor of {self.world_size}"
            )
        return self
