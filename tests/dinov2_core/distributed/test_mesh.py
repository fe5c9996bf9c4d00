"""mesh: one rank takes the path of many."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dinov2_core.distributed.mesh import SHARD_DIMENSION, is_local_main_rank, process_group
from dinov2_core.errors import SettingsError


def test_a_process_alone_is_the_main_rank_of_one() -> None:
    with process_group() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main_rank) == (0, 1, True)
        assert ranks.mesh.mesh_dim_names == (SHARD_DIMENSION,)
        assert ranks.gather(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
    assert not dist.is_initialized()


def test_the_group_is_left_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), process_group():
        raise RuntimeError("inside")
    assert not dist.is_initialized()


def test_ranks_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SettingsError, match="WORLD_SIZE is 2 but MASTER_ADDR is not set"):
        process_group().__enter__()


def test_ranks_must_divide_into_replicas() -> None:
    message = "1 ranks do not divide into 2 replicas; set topology.num_replicas"
    with pytest.raises(SettingsError, match=message), process_group(num_replicas=2):
        pass


def test_the_first_rank_of_a_node_manages_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not is_local_main_rank()
    monkeypatch.delenv("LOCAL_RANK")
    assert is_local_main_rank()
