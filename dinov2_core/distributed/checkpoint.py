"""Resumable checkpoints: whole or absent, verified before they are read, free of the rank count.

A checkpoint is a directory `step_00000200` that PyTorch DCP wrote, with a marker `complete.json`
that holds the sha256 of every other file. DCP keeps its index as a pickle, so that a changed file
could run code: nothing is opened before all its bytes agree with the marker. The marker is no
signature; checkpoints belong where only their owner can write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

logger = logging.getLogger(__name__)

MARKER = "complete.json"
"""Written last; without it a directory is no checkpoint."""
_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete, verified checkpoint."""

    path: Path
    """Directory."""
    step: int
    """Optimizer steps taken; the next step has this number."""
    identity: str
    """Of the settings that wrote it."""


def checkpoint_path(directory: Path, *, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return directory / f"step_{step:08d}"


def save_checkpoint(
    state: Mapping[str, Tensor], *, directory: Path, step: int, identity: str, keep_last: int
) -> Path:
    """Write a checkpoint, make it valid at once, and remove older ones. Collective.

    Written under another name, synced, and renamed after every rank has finished: a process that
    dies on the way leaves the previous checkpoint the newest. Training waits; writing in the
    background would copy the state here and run the rest in a thread.

    Args:
        state: Tensors by name, sharded ones as DTensors.
        directory: Of all checkpoints of the run; the same file system on every rank.
        step: Optimizer steps taken.
        identity: Of the settings, compared before resuming.
        keep_last: Checkpoints that stay, >= 1.

    Returns:
        Directory of the checkpoint.
    """
    final = checkpoint_path(directory, step=step)
    partial = final.with_name(final.name + _PARTIAL)
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"step_*{_PARTIAL}"):
            shutil.rmtree(leftover)
        partial.mkdir()
    dist.barrier()
    save(dict(state), storage_writer=FileSystemWriter(partial, sync_files=True))
    digests = _digests_of_all_ranks(partial)
    if dist.get_rank() == 0:
        _write_marker(partial, step=step, identity=identity, digests=digests)
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        partial.rename(final)
        _sync(directory)
        _prune(directory, newest=final, keep_last=keep_last)
    dist.barrier()
    return final


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are whole; damaged ones are passed over with a warning.

    Collective: rank 0 looks, all ranks get its answer.
    """
    found = [_newest_whole(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def load_checkpoint(state: Mapping[str, Tensor], *, checkpoint: Checkpoint) -> None:
    """Fill tensors in place from a verified checkpoint of any number of ranks. Collective.

    Args:
        state: Tensors by name, as for `save_checkpoint`; shapes must agree.
        checkpoint: From `newest_checkpoint`.
    """
    load(dict(state), storage_reader=FileSystemReader(checkpoint.path))


def _newest_whole(directory: Path) -> Checkpoint | None:
    for path in reversed(_directories(directory)):
        problem = _problem(path)
        if not problem:
            marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
            return Checkpoint(path=path, step=marker["step"], identity=marker["identity"])
        logger.warning("checkpoint %s is passed over: %s", path, problem)
    return None


def _problem(path: Path) -> str:
    """Why a directory cannot be trusted; empty if it can."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        expected: dict[str, str] = marker["files"]
        if checkpoint_path(path.parent, step=marker["step"]) != path:
            return f"its marker is of step {marker['step']}"
        if not isinstance(marker["identity"], str):
            return f"{MARKER} is not a marker"
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MARKER} is not readable"
    present = {entry.name for entry in path.iterdir()} - {MARKER}
    if present != set(expected):
        return f"its files are {sorted(present)}, not {sorted(expected)}"
    for name, digest in expected.items():
        if _digest(path / name) != digest:
            return f"{name} has changed since it was written"
    return ""


def _directories(directory: Path) -> list[Path]:
    """Directories of checkpoints, oldest first."""
    if not directory.exists():
        return []
    named = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(named, key=lambda pair: int(pair[0].group(1)))]


def _digests_of_all_ranks(partial: Path) -> dict[str, str]:
    """Digests of every rank's files; each rank reads its own."""
    own = {p.name: _digest(p) for p in sorted(partial.glob(f"__{dist.get_rank()}_*"))}
    if dist.get_rank() == 0:
        own[".metadata"] = _digest(partial / ".metadata")
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: digest for part in gathered for name, digest in part.items()}


def _write_marker(partial: Path, *, step: int, identity: str, digests: dict[str, str]) -> None:
    marker = {"step": step, "identity": identity, "files": digests}
    with (partial / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)


def _prune(directory: Path, *, newest: Path, keep_last: int) -> None:
    """Keep the newest ones; later steps belong to an abandoned or damaged attempt."""
    paths = _directories(directory)
    position = paths.index(newest)
    older = [path for path in paths[:position] if (path / MARKER).exists()]
    kept = {newest, *older[max(len(older) - keep_last + 1, 0) :]}
    for path in paths:
        if path not in kept:
            (path / MARKER).unlink(missing_ok=True)  # invalid before it is half removed
            shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    """Make the names in a directory last through a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
