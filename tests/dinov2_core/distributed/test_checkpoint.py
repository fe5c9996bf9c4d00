"""checkpoint: whole or absent, in every way a process can die or a file can change."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.checkpoint import (
    MARKER,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import CheckpointError


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


def save(
    directory: Path, *, step: int, keep_last: int = 3, keep_every_steps: int | None = None
) -> Path:
    state = {"weight": torch.full((3,), float(step)), "step": torch.tensor(float(step))}
    return save_checkpoint(
        state,
        directory=directory,
        step=step,
        identity="settings",
        retention=Checkpoints(
            every_steps=1, keep_last=keep_last, keep_every_steps=keep_every_steps
        ),
    )


def loaded(directory: Path) -> dict[str, Tensor]:
    checkpoint = newest_checkpoint(directory)
    assert checkpoint is not None
    state = {"weight": torch.zeros(3), "step": torch.zeros(())}
    load_checkpoint(state, checkpoint=checkpoint)
    return state


def test_what_was_saved_is_loaded_in_place(ranks: Ranks, tmp_path: Path) -> None:
    path = save(tmp_path, step=200)
    assert path == tmp_path / "step_00000200"
    assert torch.equal(loaded(tmp_path)["weight"], torch.full((3,), 200.0))
    assert loaded(tmp_path)["step"] == 200


def test_an_empty_or_absent_directory_has_no_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


def flip_a_byte(path: Path) -> None:
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "has changed": flip_a_byte,
    "its files are": lambda path: (path / "__0_0.distcp").unlink(),
    "has no complete.json": lambda path: (path / MARKER).unlink(),
    "is not readable": lambda path: (path / MARKER).write_text('{"step": 2'),
    ".metadata has changed": lambda path: (path / ".metadata").write_bytes(b"cos\nsystem\n."),
    "its marker is of step": lambda path: (path / MARKER).write_text(
        (path / MARKER).read_text().replace('"step": 2', '"step": 3')
    ),
}


@pytest.mark.parametrize("warning", DAMAGES)
def test_the_previous_checkpoint_replaces_a_damaged_one(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture, warning: str
) -> None:
    save(tmp_path, step=1)
    DAMAGES[warning](save(tmp_path, step=2))
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path)["step"] == 1
    assert "step_00000002 is skipped" in caplog.text
    assert warning in caplog.text
    save(tmp_path, step=2)
    assert loaded(tmp_path)["step"] == 2


def test_only_the_newest_stay(ranks: Ranks, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step=step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_checkpoints_at_multiples_stay_for_good(ranks: Ranks, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6, 7):
        save(tmp_path, step=step, keep_last=1, keep_every_steps=3)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["3", "6", "7"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one(
    ranks: Ranks, tmp_path: Path
) -> None:
    save(tmp_path, step=1, keep_last=1)
    (tmp_path / "step_00000002").write_text("in the way")
    with pytest.raises(CheckpointError, match="rank 0: NotADirectoryError"):
        save(tmp_path, step=2, keep_last=1)
    (tmp_path / "step_00000002").unlink()
    assert loaded(tmp_path)["step"] == 1


def test_a_full_disk_is_an_error_that_names_the_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk; PyTorch raises no `Exception` here."""
    save(tmp_path, step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_00000002 .*rank 0: .* MB are free in"):
            save_checkpoint(
                {"weight": torch.zeros(10**6)},
                directory=tmp_path,
                step=2,
                identity="settings",
                retention=Checkpoints(),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert loaded(tmp_path)["step"] == 1


def test_tensors_that_do_not_fit_are_an_error(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path, step=1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"step_00000001 could not be read .rank 0"):
        load_checkpoint({"weight": torch.zeros(4)}, checkpoint=checkpoint)


def test_a_damaged_later_one_does_not_displace_a_new_one(ranks: Ranks, tmp_path: Path) -> None:
    flip_a_byte(save(tmp_path, step=9))
    save(tmp_path, step=4, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004"]


def test_a_process_killed_while_saving_leaves_the_previous_one(
    run_ranks: Callable[..., list[int]], tmp_path: Path
) -> None:
    codes = run_ranks("die_while_saving", tmp_path, world_size=1, is_separate=True)
    assert codes == [-signal.SIGKILL]
    assert (tmp_path / "step_00000002.partial").exists()
    with process_group():
        state = {"weight": torch.zeros(4)}
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint is not None
        assert checkpoint.path == checkpoint_path(tmp_path, step=1)
        load_checkpoint(state, checkpoint=checkpoint)
        assert torch.equal(state["weight"], torch.ones(4))
        save(tmp_path, step=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
