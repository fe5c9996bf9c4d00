"""remote_checkpoints: checkpoints in a store, complete or absent there too."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.checkpoint import (
    MARKER,
)
from dinov2_core.distributed.checkpoint_writer import CheckpointWriter
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.distributed.remote_checkpoints import newest_on_all_nodes
from dinov2_core.errors import CheckpointError
from tests.dinov2_core.distributed import nodes
from tests.dinov2_core.distributed.nodes import FolderRemote

RETENTION = Checkpoints(keep_last=2)
STATE = {"weight": torch.arange(3.0)}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def remote(tmp_path: Path) -> FolderRemote:
    return FolderRemote(tmp_path / "there")


class Broken(FolderRemote):
    """A store that does not take some checkpoints."""

    refused: tuple[str, ...] = ()

    def upload(self, files: Sequence[Path]) -> None:
        super().upload(files[:1])
        if files[0].parent.name in self.refused:
            raise ConnectionError("the line broke")
        super().upload(files[1:])


class Blocked(FolderRemote):
    """A store that takes files when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_go = threading.Semaphore(0)

    def upload(self, files: Sequence[Path]) -> None:
        if files[0].name != MARKER:
            self.may_go.acquire()
        super().upload(files)


def writer(
    here: Path, remote: FolderRemote, retention: Checkpoints = RETENTION
) -> CheckpointWriter:
    return CheckpointWriter(here, identity="settings", retention=retention, remote=remote)


def valid(remote: FolderRemote) -> list[str]:
    return sorted(name for name, marker in remote.markers().items() if marker)


def test_nodes_download_what_they_miss(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-W", "ignore", nodes.__file__, str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": rank}) for rank in "01"
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    whole = sorted([".metadata", MARKER, "__0_0.distcp", "__1_0.distcp"])
    steps = ["step_00000002", "step_00000003"]
    assert seen[0]["written"] == {step: [f for f in whole if "1_0" not in f] for step in steps}
    assert seen[1]["written"] == {step: ["__1_0.distcp", MARKER] for step in steps}
    assert nodes.files(tmp_path / "store") == dict.fromkeys(steps, whole)
    for one in seen:
        assert one["downloaded"]["step_00000003"] == whole
        assert one["first"] == one["second"] == [300.0 + i for i in range(8)]


def test_the_same_checkpoints_stay_in_the_store_as_here(
    ranks: Ranks, here: Path, remote: FolderRemote
) -> None:
    with writer(
        here, remote, Checkpoints(every_steps=1, keep_last=1, keep_every_steps=3)
    ) as background:
        for step in range(1, 8):
            background.save(STATE, step=step)
            background.wait()
    assert valid(remote) == ["step_00000003", "step_00000006", "step_00000007"]
    assert sorted(path.name for path in here.iterdir()) == valid(remote)


def test_an_empty_directory_is_filled_from_the_newest_in_the_store(
    ranks: Ranks, here: Path, remote: FolderRemote
) -> None:
    with writer(here, remote) as background:
        background.save(STATE, step=1)
        background.save(STATE, step=2)
    shutil.rmtree(here)
    found = newest_on_all_nodes(here, remote=remote)
    assert found is not None
    assert found.path == here / "step_00000002"
    assert nodes.files(here)["step_00000002"] == nodes.files(remote.folder)["step_00000002"]


def test_a_broken_upload_is_no_checkpoint_and_training_goes_on(
    ranks: Ranks, here: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(tmp_path / "there")
    broken.refused = ("step_00000002",)
    with writer(here, broken) as background:
        for step in (1, 2):
            background.save(STATE, step=step)
        background._wait_for_write()
        newest = newest_on_all_nodes(here, remote=broken)
        assert newest is not None
        assert newest.step == 2  # whole here
        shutil.rmtree(here)
        newest = newest_on_all_nodes(here, remote=broken)
        assert newest is not None
        assert newest.step == 1  # whole there
        background.save(STATE, step=3)
    assert (
        "step_00000002 could not be uploaded to the store (rank 0: ConnectionError" in caplog.text
    )
    assert valid(broken) == ["step_00000001", "step_00000003"]


def test_a_broken_last_upload_is_an_error(ranks: Ranks, here: Path, tmp_path: Path) -> None:
    broken = Broken(tmp_path / "there")
    broken.refused = ("step_00000001",)
    message = "step_00000001 could not be uploaded to the store"
    with pytest.raises(CheckpointError, match=message), writer(here, broken) as background:
        background.save(STATE, step=1)
    assert valid(broken) == []


def test_training_waits_for_no_upload_until_two_are_behind(
    ranks: Ranks, here: Path, tmp_path: Path
) -> None:
    blocked = Blocked(tmp_path / "there")
    saved = threading.Event()
    with writer(here, blocked) as background:
        background.save(STATE, step=1)
        background.save(STATE, step=2)

        def third() -> None:
            background.save(STATE, step=3)
            saved.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert not saved.wait(0.5)
        blocked.may_go.release()
        assert saved.wait(20)
        thread.join()
        blocked.may_go.release(2)
    assert valid(blocked) == ["step_00000002", "step_00000003"]


def damage(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"cos\nsystem\n.")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", MARKER])
def test_a_damaged_copy_is_skipped(
    ranks: Ranks, here: Path, remote: FolderRemote, name: str
) -> None:
    with writer(here, remote) as background:
        background.save(STATE, step=1)
        background.save(STATE, step=2)
    shutil.rmtree(here)
    damage(remote.folder / "step_00000002", name)
    found = newest_on_all_nodes(here, remote=remote)
    assert found is not None
    assert found.step == 1


def test_what_is_damaged_here_is_downloaded_again(
    ranks: Ranks, here: Path, remote: FolderRemote
) -> None:
    with writer(here, remote) as background:
        background.save(STATE, step=1)
    damage(here / "step_00000001", "__0_0.distcp")
    found = newest_on_all_nodes(here, remote=remote)
    assert found is not None
    assert found.step == 1


def test_a_damaged_marker_in_the_store_costs_no_file_here(
    ranks: Ranks, here: Path, remote: FolderRemote, caplog: pytest.LogCaptureFixture
) -> None:
    with writer(here, remote) as background:
        background.save(STATE, step=1)
        background.save(STATE, step=2)
    kept = nodes.files(here)
    damage(remote.folder / "step_00000002", MARKER)
    found = newest_on_all_nodes(here, remote=remote)
    assert found is not None
    assert found.step == 1
    assert nodes.files(here) == kept
    assert "step_00000002 is skipped: rank 0: it is another one than in the store" in caplog.text


def test_a_marker_cannot_name_files_elsewhere(
    ranks: Ranks, here: Path, remote: FolderRemote
) -> None:
    folder = remote.folder / "step_00000001"
    folder.mkdir()
    marker: dict[str, Any] = {"step": 1, "identity": "x", "files": {"../../stolen": "0"}}
    (folder / MARKER).write_text(json.dumps(marker))
    assert newest_on_all_nodes(here, remote=remote) is None
    assert not (here.parent / "stolen").exists()


def test_a_store_that_does_not_answer_is_not_an_empty_one(
    ranks: Ranks, here: Path, remote: FolderRemote
) -> None:
    shutil.rmtree(remote.folder)
    with pytest.raises(CheckpointError, match="cannot be read .rank 0: FileNotFoundError"):
        newest_on_all_nodes(here, remote=remote)
