"""Settings of the training stages: what is learned and on how many processes."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dinov2_core.config import Frozen, TrainingConfig


class Topology(Frozen):
    """Processes that train together; each holds one shard of the model (FSDP)."""

    num_nodes: int = Field(1, ge=1)
    """Machines or pods."""
    processes_per_node: int = Field(1, ge=1)
    """Ranks on each, one per GPU where there are GPUs."""
    threads_per_process: int = Field(2, ge=1)
    """CPU threads of each rank for arithmetic."""
    loader_threads: int = Field(2, ge=1)
    """Threads of each rank that decode and crop images."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.processes_per_node


class TrainStage(Frozen):
    """One training phase."""

    learning: TrainingConfig
    """What is learned."""
    topology: Topology = Topology()
    """Where."""
    initial_weights: str = ""
    """Safetensors file with a teacher to start from; empty starts from the given checkpoint
    manifest, or from random weights where there is none."""

    @model_validator(mode="after")
    def _world_divides_batch(self) -> Self:
        batch, world = self.learning.optimization.global_batch_size, self.topology.world_size
        if batch % world:
            raise ValueError(
                f"learning.optimization.global_batch_size {batch} is not divisible by {world} "
                f"ranks (topology.num_nodes {self.topology.num_nodes} x "
                f"topology.processes_per_node {self.topology.processes_per_node}); "
                f"choose a multiple of {world}"
            )
        return self
