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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

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
_T = TypeVar("_T")


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


class CheckpointNotWritten(Exception):
    """A checkpoint could not be written; raised on every rank, the checkpoints before it stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints stay; the newest always does."""

    keep_last: int
    """Newest ones, >= 1."""
    keep_every_steps: int | None = None
    """Those at multiples of so many steps stay for good; None where there are none."""

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint after so many steps stays for good."""
        return self.keep_every_steps is not None and step % self.keep_every_steps == 0


def save_checkpoint(
    state: Mapping[str, Tensor],
    *,
    directory: Path,
    step: int,
    identity: str,
    retention: Retention,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint, make it valid at once, and remove older ones. Collective.

    Written under another name, synced, and renamed after every rank has finished: a process that
    dies on the way leaves the previous checkpoint the newest. The caller waits; see
    `CheckpointWriter` for one that does not.

    Args:
        state: Tensors by name, sharded ones as DTensors.
        directory: Of all checkpoints of the run; the same file system on every rank.
        step: Optimizer steps taken.
        identity: Of the settings, compared before resuming.
        retention: What stays.
        group: All ranks, for what they tell each other; None is the default group.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointNotWritten: On every rank when any rank could not do its part.
    """
    final = checkpoint_path(directory, step=step)
    partial = final.with_name(final.name + _PARTIAL)

    def publish(digests: list[dict[str, str]]) -> None:
        files = {name: digest for part in digests for name, digest in part.items()}
        _write_marker(partial, step=step, identity=identity, digests=files)
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        partial.rename(final)
        _sync(directory)
        _prune(directory, newest=final, retention=retention)

    writer = FileSystemWriter(partial, sync_files=True)
    done = _Together(group, path=final)
    done(lambda: _make_room(partial), on_main_rank_only=True)
    done(lambda: save(dict(state), storage_writer=writer, process_group=group))
    digests = done(lambda: _own_digests(partial))
    done(lambda: publish(digests), on_main_rank_only=True)
    return final


class _Together:
    """Does a part of the work on every rank and fails on all of them if it fails on one."""

    def __init__(self, group: dist.ProcessGroup | None, *, path: Path) -> None:
        self._group = group
        self._path = path

    def __call__(self, work: Callable[[], _T], *, on_main_rank_only: bool = False) -> list[_T]:
        """Results of all ranks that work, on every rank; also a barrier."""
        outcome: tuple[_T | None, str] = (None, "")
        if dist.get_rank() == 0 or not on_main_rank_only:
            try:
                outcome = (work(), "")
            except Exception as error:
                logger.debug("checkpoint %s failed here", self._path, exc_info=True)
                outcome = (None, f"{type(error).__name__}: {error}")
        outcomes = [outcome for _ in range(dist.get_world_size())]
        dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = [f"rank {n}: {text}" for n, (_, text) in enumerate(outcomes) if text]
        if failures:
            raise CheckpointNotWritten(
                f"checkpoint {self._path} could not be written ({'; '.join(failures)}); see that "
                "the disk has room and can be written to, and start again"
            )
        return [cast("_T", result) for result, _ in outcomes]


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


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _make_room(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for leftover in partial.parent.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _own_digests(partial: Path) -> dict[str, str]:
    """Digests of the files that this rank wrote."""
    own = {p.name: _digest(p) for p in sorted(partial.glob(f"__{dist.get_rank()}_*"))}
    if dist.get_rank() == 0:
        own[".metadata"] = _digest(partial / ".metadata")
    return own


def _write_marker(partial: Path, *, step: int, identity: str, digests: dict[str, str]) -> None:
    marker = {"step": step, "identity": identity, "files": digests}
    with (partial / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)


def _prune(directory: Path, *, newest: Path, retention: Retention) -> None:
    """Keep the newest ones; later steps belong to an abandoned or damaged attempt."""
    paths = _directories(directory)
    position = paths.index(newest)
    older = [path for path in paths[:position] if (path / MARKER).exists()]
    kept = {newest, *older[max(len(older) - retention.keep_last + 1, 0) :]}
    kept.update(path for path in older if retention.keeps(_step(path)))
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
