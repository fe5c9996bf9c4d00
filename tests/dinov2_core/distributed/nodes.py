"""Two ranks as two nodes that share no directory: `nodes.py FOLDER`; and a store to test with."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.checkpoint import (
    MARKER,
    load_checkpoint,
)
from dinov2_core.distributed.checkpoint_writer import CheckpointWriter
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.distributed.remote_checkpoints import newest_on_all_nodes


class FolderRemote:
    """A store that is a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def markers(self) -> dict[str, str]:
        found = {path.name: path / MARKER for path in self.folder.iterdir()}
        return {name: m.read_text() if m.exists() else "" for name, m in found.items()}

    def upload(self, files: Sequence[Path]) -> None:
        for file in files:
            (self.folder / file.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(file, self.folder / file.parent.name / file.name)

    def download(self, files: Sequence[Path]) -> None:
        for file in files:
            there = self.folder / file.parent.name / file.name
            if there.exists():
                shutil.copyfile(there, file)

    def commit(self, marker: Path) -> None:
        self.upload([marker])

    def invalidate(self, folder: str) -> None:
        (self.folder / folder / MARKER).unlink(missing_ok=True)

    def remove(self, folder: str) -> None:
        self.invalidate(folder)
        shutil.rmtree(self.folder / folder)


def state_at(step: int, ranks: Ranks) -> dict[str, torch.Tensor]:
    """A tensor split over the ranks, and one that all have."""
    whole = torch.arange(8.0) + 100 * step
    return {
        "weight": distribute_tensor(whole, ranks.mesh, [Shard(0)]),
        "step": torch.tensor(float(step)),
    }


def loaded(ranks: Ranks, own: Path, store: Path) -> list[float]:
    """The newest checkpoint's tensor."""
    checkpoint = newest_on_all_nodes(own, remote=FolderRemote(store))
    assert checkpoint is not None
    state = state_at(0, ranks)
    load_checkpoint(state, checkpoint=checkpoint)
    weight = state["weight"]
    assert isinstance(weight, DTensor)
    assert state["step"] == checkpoint.step
    values: list[float] = weight.full_tensor().tolist()
    return values


def files(folder: Path) -> dict[str, list[str]]:
    return {p.name: sorted(f.name for f in p.iterdir()) for p in sorted(folder.iterdir())}


def save_and_lose_a_node(ranks: Ranks, folder: Path) -> None:
    """Save on two nodes, lose what one of them has, and read on both; writes what was seen."""
    own, store = folder / f"node{ranks.rank}", folder / "store"
    remote = FolderRemote(store)
    retention = Checkpoints(keep_last=2)
    with CheckpointWriter(own, identity="test", retention=retention, remote=remote) as writer:
        for step in (1, 2, 3):
            writer.save(state_at(step, ranks), step=step)
    seen = {"written": files(own), "first": loaded(ranks, own, store), "downloaded": files(own)}
    if ranks.rank == 1:
        shutil.rmtree(own)
    seen["second"] = loaded(ranks, own, store)
    (folder / f"seen{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(1)
    with process_group(timeout_seconds=60) as all_ranks:
        save_and_lose_a_node(all_ranks, Path(sys.argv[1]))
