"""Resumable checkpoints: complete or absent, verified before they are read, for any rank count.

A checkpoint is a directory `step_00000200` that PyTorch DCP wrote, with a marker `complete.json`
that holds the sha256 of every other file. Nothing is opened before all its bytes agree with the
marker, and the index, a pickle, is read without running code that it names. The marker is no
signature; checkpoints belong where only their owner can write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.all_ranks import all_ranks_or_raise
from dinov2_core.distributed.checkpoint_metadata import TensorReader
from dinov2_core.distributed.mesh import is_local_main_rank
from dinov2_core.errors import CheckpointError

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
    """Directory of the checkpoint after so many steps."""
    return directory / f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Steps of the checkpoint whose directory has a name; None for other names."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def kept_steps(steps: Iterable[int], *, newest: int, retention: Checkpoints) -> set[int]:
    """Those of some checkpoints that stay when a newest one is complete.

    Later steps belong to an abandoned or damaged attempt.
    """
    older = sorted(step for step in steps if step < newest)
    recent = older[max(len(older) - retention.keep_last + 1, 0) :]
    every = retention.keep_every_steps
    return {newest, *recent, *(step for step in older if every and step % every == 0)}


def save_checkpoint(
    state: Mapping[str, Tensor],
    *,
    directory: Path,
    step: int,
    identity: str,
    retention: Checkpoints,
    group: dist.ProcessGroup | None = None,
    is_shared: bool = True,
) -> Path:
    """Write a checkpoint, make it valid at once, and remove older ones. Collective.

    Written under another name, synced, and renamed after every rank has finished: a process that
    dies on the way leaves the previous checkpoint the newest. The caller waits; see
    `CheckpointWriter` for one that does not.

    Args:
        state: Tensors by name, sharded ones as DTensors.
        directory: Of all checkpoints of the run.
        step: Optimizer steps taken.
        identity: Of the settings, compared before resuming.
        retention: Which checkpoints stay.
        group: All ranks, for the exchange of results; None is the default group.
        is_shared: Whether all nodes see the same directory; otherwise the checkpoint is complete
            only in the store, after `upload_checkpoint`.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointError: On every rank when any rank could not do its part.
    """
    final = checkpoint_path(directory, step=step)
    unfinished = final.with_name(final.name + _PARTIAL)

    def publish(digests: list[dict[str, str]]) -> None:
        files = {name: digest for part in digests for name, digest in part.items()}
        _write_marker(unfinished, step=step, identity=identity, digests=files)
        if final.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(final)
        unfinished.rename(final)
        _sync(directory)
        _prune(directory, newest=step, retention=retention)

    writer = FileSystemWriter(unfinished, sync_files=True)
    together = partial(all_ranks_or_raise, error=_write_error(final), group=group)
    is_main = dist.get_rank() == 0 if is_shared else is_local_main_rank()
    together(lambda: _make_room(unfinished), participates=is_main)
    together(lambda: _raise_own(save, dict(state), storage_writer=writer, process_group=group))
    digests = together(lambda: {file.name: _digest(file) for file in own_files(unfinished)})
    together(lambda: publish(digests), participates=is_main)
    return final


def _write_error(path: Path) -> Callable[[str], Exception]:
    def error(failures: str) -> Exception:
        disk = next(parent for parent in path.parents if parent.exists())
        megabytes = shutil.disk_usage(disk).free // 10**6
        return CheckpointError(
            f"checkpoint {path} could not be written ({failures}); {megabytes:,} MB are free in "
            f"{disk}: free more, or make it writable, and start again"
        )

    return error


def load_checkpoint(state: Mapping[str, Tensor], *, checkpoint: Checkpoint) -> None:
    """Fill tensors in place from a verified checkpoint of any number of ranks. Collective.

    Args:
        state: Tensors by name, as for `save_checkpoint`; shapes must agree.
        checkpoint: From `newest_checkpoint`.

    Raises:
        CheckpointError: On every rank when any rank could not read it.
    """
    reader = TensorReader(checkpoint.path)
    all_ranks_or_raise(
        lambda: _raise_own(load, dict(state), storage_reader=reader),
        error=lambda failures: CheckpointError(
            f"checkpoint {checkpoint.path} could not be read ({failures}); remove it to continue "
            "from the one before"
        ),
    )


def _raise_own(work: Callable[..., object], state: dict[str, Tensor], **options: Any) -> None:
    """Raise what failed on this rank: DCP raises all ranks' failures, and no `Exception`."""
    try:
        work(state, **options)
    except CheckpointException as error:
        if own := error.failures.get(dist.get_rank()):
            raise own[0] from error


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint; damaged ones are skipped with a warning. Collective.

    Rank 0 searches a directory that all ranks share.
    """
    found = [_newest_complete(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _newest_complete(directory: Path) -> Checkpoint | None:
    for path in reversed(checkpoint_directories(directory).values()):
        problem = problem_of(path)
        if not problem:
            return described(path, (path / MARKER).read_text(encoding="utf-8"))
        logger.warning("checkpoint %s is skipped: %s", path, problem)
    return None


def described(path: Path, marker: str) -> Checkpoint:
    """A checkpoint without problems from the text of its marker."""
    facts = json.loads(marker)
    return Checkpoint(path=path, step=facts["step"], identity=facts["identity"])


def problem_of(path: Path) -> str:
    """Why a checkpoint's directory cannot be trusted; empty if it can."""
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text(encoding="utf-8"))
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
    changed = [name for name, digest in expected.items() if _digest(path / name) != digest]
    return f"{changed[0]} has changed since it was written" if changed else ""


def files_of(marker: str) -> dict[str, str]:
    """Digests of a checkpoint's files by their names; none where a marker is none."""
    try:
        files = json.loads(marker)["files"]
        return {name: str(files[name]) for name in files if Path(name).name == name}
    except (ValueError, KeyError, TypeError):
        return {}


def remove_damaged_files(path: Path, *, files: Mapping[str, str]) -> list[Path]:
    """Remove all but the given files, those with other digests too; gives the missing ones."""
    path.mkdir(parents=True, exist_ok=True)
    for entry in path.iterdir():
        if entry.name not in files or _digest(entry) != files[entry.name]:
            entry.unlink()
    return [path / name for name in files if not (path / name).exists()]


def checkpoint_directories(directory: Path) -> dict[int, Path]:
    """Directories of checkpoints by their steps, oldest first."""
    if not directory.exists():
        return {}
    steps = {step_of(path.name): path for path in directory.iterdir()}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None)}


def own_files(path: Path) -> list[Path]:
    """The files of a checkpoint that this rank wrote."""
    own = sorted(path.glob(f"__{dist.get_rank()}_*"))
    return [path / ".metadata", *own] if dist.get_rank() == 0 else own


def _make_room(unfinished: Path) -> None:
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for leftover in unfinished.parent.glob(f"step_*{_PARTIAL}"):
        shutil.rmtree(leftover)
    unfinished.mkdir()


def _write_marker(unfinished: Path, *, step: int, identity: str, digests: dict[str, str]) -> None:
    marker = {"step": step, "identity": identity, "files": digests}
    with (unfinished / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(unfinished)


def _prune(directory: Path, *, newest: int, retention: Checkpoints) -> None:
    paths = checkpoint_directories(directory)
    complete = [step for step, path in paths.items() if (path / MARKER).exists()]
    kept = kept_steps(complete, newest=newest, retention=retention)
    for step, path in paths.items():
        if step not in kept:
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
