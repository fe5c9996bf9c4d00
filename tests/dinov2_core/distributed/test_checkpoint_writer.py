"""checkpoint_writer: training waits for a copy only, and nothing is lost on the way."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.checkpoint_writer import CheckpointWriter
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import CheckpointError

RETENTION = Checkpoints(keep_last=2)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


def writer(directory: Path) -> CheckpointWriter:
    return CheckpointWriter(directory, identity="settings", retention=RETENTION)


def test_a_checkpoint_holds_what_was_there_when_it_began(ranks: Ranks, tmp_path: Path) -> None:
    state = {"weight": torch.zeros(3_000_000), "step": torch.tensor(0.0)}
    with writer(tmp_path) as background:
        for step in (1, 2, 3):
            state["weight"].fill_(step)
            background.save(state, step=step)
            assert newest_checkpoint(tmp_path / "absent") is None  # the ranks talk meanwhile
            state["weight"].fill_(-1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.identity) == (3, "settings")
    load_checkpoint(state, checkpoint=checkpoint)
    assert (state["weight"] == 3).all()


def test_an_error_surfaces_at_the_next_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    state = {"weight": torch.zeros(3)}
    message = "step_00000002 could not be written"
    with pytest.raises(CheckpointError, match=message), writer(tmp_path) as background:
        background.save(state, step=1)
        background.wait()
        (tmp_path / "step_00000002").write_text("in the way")
        background.save(state, step=2)
        background.save(state, step=3)
    assert not (tmp_path / "step_00000003").exists()
    assert (tmp_path / "step_00000001").exists()


def test_an_error_of_the_last_checkpoint_surfaces_at_the_end(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "step_00000001").write_text("in the way")
    with pytest.raises(CheckpointError), writer(tmp_path) as background:
        background.save({"weight": torch.zeros(3)}, step=1)


def test_an_error_does_not_hide_the_one_that_ended_training(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step_00000001").write_text("in the way")
    with pytest.raises(KeyError), writer(tmp_path) as background:
        background.save({"weight": torch.zeros(3)}, step=1)
        raise KeyError
    assert "the last checkpoint was not written either" in caplog.text


def test_a_process_killed_in_the_background_leaves_the_previous_one(
    run_ranks: Callable[..., list[int]], tmp_path: Path
) -> None:
    codes = run_ranks("die_in_background", tmp_path, world_size=1, is_separate=True)
    assert codes == [-signal.SIGKILL]
    assert (tmp_path / "step_00000002.partial").exists()
    with process_group():
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert checkpoint.step == 1


@pytest.mark.slow
def test_training_waits_less_than_a_tenth_of_a_write(ranks: Ranks, tmp_path: Path) -> None:
    """State of 100 M parameters: student, teacher and two moments, 1.6 GB in fp32."""
    state = {f"weight_{i}": torch.randn(25, 1_000_000) for i in range(16)}
    started = time.perf_counter()
    save_checkpoint(
        state, directory=tmp_path / "sync", step=0, identity="settings", retention=RETENTION
    )
    write_seconds = time.perf_counter() - started
    shutil.rmtree(tmp_path / "sync")
    stalls = []
    with writer(tmp_path / "async") as background:
        background.prepare(state)
        for step in range(4):
            started = time.perf_counter()
            background.save(state, step=step)
            stalls.append(time.perf_counter() - started)
            time.sleep(3 * write_seconds)  # the next one is not due before this one is written
    assert max(stalls) < 0.1 * write_seconds, (stalls, write_seconds)
