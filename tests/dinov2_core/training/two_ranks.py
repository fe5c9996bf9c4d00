"""What each of two ranks does in test_guard_state: `two_ranks.py SHARDS OUTPUT`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective, SoftmaxCentering
from dinov2_core.config.training import Crops, Optimization, TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.training.loop import TrainingRun

HEAD = Head(num_prototypes=40, bottleneck_dim=8, hidden_dim=24)
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=32, depth=2, num_heads=2), patch_size_pixels=4
    ),
    crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8, num_local_crops=2),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    centering=SoftmaxCentering(),
    optimization=Optimization(
        num_steps=4, warmup_steps=0, global_batch_size=8, freeze_prototypes_steps=0
    ),
    precision="fp32",
)
BAD_STEP = 2


class InfiniteBatch:
    """A loader one of whose batches has an infinite pixel."""

    def __init__(self, loader: PretrainLoader) -> None:
        self._loader = loader

    def __next__(self) -> PretrainBatch:
        batch = next(self._loader)
        crops = batch.global_crops.clone()
        crops[0, 0, 0, 0] = torch.inf
        return dataclasses.replace(batch, global_crops=crops)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class FaultyRun(TrainingRun):
    """Rank 1 sees an infinite pixel at one step; every rank keeps its state around that step."""

    def _step(self, loader: PretrainLoader, **options: object) -> Any:
        if self.num_steps_done != BAD_STEP:
            return super()._step(loader, **options)  # type: ignore[arg-type]
        self.before = self.own_state()
        is_faulty = self._ranks.rank == 1
        faulty = InfiniteBatch(loader) if is_faulty else loader
        result = super()._step(faulty, **options)  # type: ignore[arg-type]
        self.after = self.own_state()
        return result

    def own_state(self) -> dict[str, Tensor]:
        """This rank's part of everything that a checkpoint would hold."""
        return {
            name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in self._state().items()
            if name != "guards"
        }


class DeferredFaultyRun(FaultyRun):
    """Lets the device decide and reads its numbers a step later, as on CUDA."""

    def __init__(self, config: TrainingConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._num_unread = 1


def train(ranks: Ranks, shards: Path, output: Path) -> None:
    """Train to the end, both ways; keeps what the bad step changed, and the last state."""
    results = {}
    for kind in (FaultyRun, DeferredFaultyRun):
        run = kind(CONFIG, ranks=ranks, checkpoints=output / kind.__name__)
        reports = list(run.steps(shards=shards, loader_threads=1))
        results[kind.__name__] = {
            "changed": [k for k, v in run.before.items() if not torch.equal(v, run.after[k])],
            "guards": [dataclasses.asdict(report.guards) for report in reports],
            "losses": [repr(report.losses) for report in reports],
            "state": run.own_state(),
        }
    torch.save(results, output / f"rank_{ranks.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(timeout_seconds=60) as ranks:
        train(ranks, Path(sys.argv[1]), Path(sys.argv[2]))
