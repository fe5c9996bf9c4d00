"""checkpoint_metadata: the index is read, code that it names does not run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import Shard, distribute_tensor

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.checkpoint_metadata import MetadataUnpickler, TensorReader
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import CheckpointError


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.fixture
def checkpoint(ranks: Ranks, tmp_path: Path) -> Checkpoint:
    state = {
        "sharded": distribute_tensor(torch.arange(8.0), ranks.mesh, [Shard(0)]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "step": torch.tensor(3, dtype=torch.int64),
        "guards": torch.zeros(3, dtype=torch.float64),
    }
    save_checkpoint(state, directory=tmp_path, step=1, identity="test", retention=Checkpoints())
    found = newest_checkpoint(tmp_path)
    assert found is not None
    return found


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_it_reads_what_torch_reads(checkpoint: Checkpoint) -> None:
    ours = TensorReader(checkpoint.path).read_metadata()
    theirs: Metadata = pickle.loads((checkpoint.path / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_code_in_the_index_does_not_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    index = checkpoint.path / ".metadata"
    index.write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir does not belong"):
        load_checkpoint({"half": torch.zeros(2, dtype=torch.bfloat16)}, checkpoint=checkpoint)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "pickled", [b"cbuiltins\neval\n.", b"ctorch\nload\n.", b"ctorch.serialization\nload\n."]
)
def test_names_that_no_index_needs_are_refused(tmp_path: Path, pickled: bytes) -> None:
    (tmp_path / "index").write_bytes(pickled)
    with (
        (tmp_path / "index").open("rb") as file,
        pytest.raises(pickle.UnpicklingError, match="does not belong"),
    ):
        MetadataUnpickler(file).load()


def test_an_index_cannot_name_files_elsewhere(checkpoint: Checkpoint) -> None:
    index = checkpoint.path / ".metadata"
    metadata: Metadata = pickle.loads(index.read_bytes())
    info = next(iter(metadata.storage_data.values()))
    info.relative_path = "../elsewhere"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match=r"\.\./elsewhere is not a file"):
        TensorReader(checkpoint.path).read_metadata()
