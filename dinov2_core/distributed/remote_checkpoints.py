"""Checkpoints in a store, for nodes that share no file system.

Each node then has a directory of checkpoints of its own, which holds at least what its ranks
wrote. A checkpoint is complete in the store, and nodes download what they miss of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.all_ranks import all_ranks_or_raise
from dinov2_core.distributed.checkpoint import (
    MARKER,
    Checkpoint,
    checkpoint_directories,
    described,
    files_of,
    kept_steps,
    own_files,
    problem_of,
    remove_damaged_files,
    step_of,
)
from dinov2_core.distributed.mesh import is_local_main_rank
from dinov2_core.errors import CheckpointError

logger = logging.getLogger(__name__)


class RemoteCheckpoints(Protocol):
    """Folders of checkpoints in a store that every node reaches.

    Methods raise when the store does not answer; they may be called from a thread.
    """

    def markers(self) -> dict[str, str]:
        """Text of the marker of every folder, by the folder's name; empty without a marker."""
        ...

    def upload(self, files: Sequence[Path]) -> None:
        """Copy files to the folders that are named like their own ones here."""
        ...

    def download(self, files: Sequence[Path]) -> None:
        """Copy files from the store; those that are missing or damaged there are left out."""
        ...

    def commit(self, marker: Path) -> None:
        """Upload a folder's marker, which makes the folder valid."""
        ...

    def invalidate(self, folder: str) -> None:
        """Remove a folder's marker."""
        ...

    def remove(self, folder: str) -> None:
        """Remove a folder, its marker first."""
        ...


def upload_checkpoint(
    path: Path,
    *,
    remote: RemoteCheckpoints,
    retention: Checkpoints,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Upload a checkpoint, make it valid in the store, and remove older ones there. Collective.

    Every rank uploads what it wrote, and the marker follows when all have: a checkpoint that is
    only half there is none.

    Args:
        path: From `save_checkpoint`.
        remote: Store of the checkpoints.
        retention: Which checkpoints stay there.
        group: All ranks, for the exchange of results; None is the default group.

    Raises:
        CheckpointError: On every rank when any rank could not do its part.
    """

    def commit() -> None:
        remote.commit(path / MARKER)
        markers = remote.markers()
        steps = {name: step for name in markers if (step := step_of(name)) is not None}
        complete = [step for name, step in steps.items() if markers[name]]
        kept = kept_steps(complete, newest=steps[path.name], retention=retention)
        for name, step in steps.items():
            if step not in kept:
                remote.remove(name)

    def error(failures: str) -> Exception:
        return CheckpointError(
            f"checkpoint {path} could not be uploaded to the store ({failures}); check that the "
            "store answers, and start again"
        )

    together = partial(all_ranks_or_raise, error=error, group=group)
    is_main = dist.get_rank() == 0
    together(lambda: remote.invalidate(path.name), participates=is_main)
    together(lambda: remote.upload(own_files(path)))
    together(commit, participates=is_main)


def newest_on_all_nodes(directory: Path, *, remote: RemoteCheckpoints) -> Checkpoint | None:
    """The newest checkpoint that is complete on every node, after downloads. Collective.

    Raises:
        CheckpointError: On every rank when the store cannot be read on one.
    """
    together = partial(all_ranks_or_raise, error=_read_error)
    is_main, manages_node = dist.get_rank() == 0, is_local_main_rank()
    (markers,) = together(lambda: _candidates(directory, remote=remote), participates=is_main)
    for name, marker in markers.items():
        path = directory / name
        found = together(
            partial(_complete, path, marker=marker, remote=remote), participates=manages_node
        )
        texts = {text for text, _ in found}
        if len(texts) == 1 and "" not in texts:
            return described(path, texts.pop())
        if is_main:
            problems = sorted({problem for _, problem in found if problem})
            logger.warning(
                "checkpoint %s is skipped: %s",
                path,
                "; ".join(problems) or "nodes have different ones of this step",
            )
    return None


def _read_error(failures: str) -> Exception:
    return CheckpointError(
        f"the store of the checkpoints cannot be read ({failures}); check that it answers, and "
        "start again"
    )


def _candidates(directory: Path, *, remote: RemoteCheckpoints) -> dict[str, str]:
    """Names of checkpoints here and in the store, newest first, with markers of the latter."""
    markers = {name: marker for name, marker in remote.markers().items() if marker}
    names = {path.name for path in checkpoint_directories(directory).values()} | set(markers)
    steps = {step: name for name in names if (step := step_of(name)) is not None}
    return {steps[step]: markers.get(steps[step], "") for step in sorted(steps, reverse=True)}


def _complete(path: Path, *, marker: str, remote: RemoteCheckpoints) -> tuple[str, str]:
    """Make a checkpoint complete on this node.

    Args:
        path: Directory of the checkpoint on this node.
        marker: Text of its marker in the store; empty if it is not there.
        remote: Has what this node misses.

    Returns:
        Text of its marker, empty if it cannot be completed; and the reason, empty if it can.
    """
    problem = problem_of(path)
    if not problem and marker and (path / MARKER).read_text(encoding="utf-8") != marker:
        problem = "it is another one than in the store"
    if problem and (files := files_of(marker)):
        remote.download(remove_damaged_files(path, files=files))
        (path / MARKER).write_text(marker, encoding="utf-8")
        problem = problem_of(path)
    if problem:
        return "", f"rank {dist.get_rank()}: {problem}"
    return (path / MARKER).read_text(encoding="utf-8"), ""
