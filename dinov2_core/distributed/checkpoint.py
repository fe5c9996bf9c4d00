"""Resumable checkpoints: whole or absent, verified before they are read, free of the rank count.

A checkpoint is a directory `step_00000200` that PyTorch DCP wrote, with a marker `complete.json`
that holds the sha256 of every other file. DCP keeps its index as a pickle, so that a changed file
could run code: nothing is opened before all its bytes agree with the marker. The marker is no
signature; checkpoints belong where only their owner can write.

Ranks share the directory of checkpoints, or, with a `Mirror`, only those of one node do: then a
checkpoint is whole in the mirror, and nodes bring what they lack before they read it.
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
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dinov2_core.distributed.mirror import Mirror, is_first_of_node
from dinov2_core.distributed.together import Together

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


class CheckpointNotWritten(Exception):
    """A checkpoint could not be written; raised on every rank, the checkpoints before it stay."""


class CheckpointsNotReached(Exception):
    """The mirror does not say which checkpoints it has, or does not give them; on every rank."""


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

    def kept(self, steps: Iterable[int], *, newest: int) -> set[int]:
        """Those of some steps that stay when a newest one is there.

        Later steps belong to an abandoned or damaged attempt.
        """
        older = sorted(step for step in steps if step < newest)
        recent = older[max(len(older) - self.keep_last + 1, 0) :]
        return {newest, *recent, *(step for step in older if self.keeps(step))}


def save_checkpoint(
    state: Mapping[str, Tensor],
    *,
    directory: Path,
    step: int,
    identity: str,
    retention: Retention,
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
        retention: What stays.
        group: All ranks, for what they tell each other; None is the default group.
        is_shared: Whether all nodes see the same directory; otherwise the checkpoint is whole
            only after `mirror_checkpoint`.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointNotWritten: On every rank when any rank could not do its part.
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
        _prune(directory, newest=final, retention=retention)

    writer = FileSystemWriter(unfinished, sync_files=True)
    done = Together(group, complaint=_write_complaint(final))
    leads = _leads(is_shared=is_shared)
    done(lambda: _make_room(unfinished), works=leads)
    done(lambda: save(dict(state), storage_writer=writer, process_group=group))
    digests = done(lambda: {file.name: _digest(file) for file in _own_files(unfinished)})
    done(lambda: publish(digests), works=leads)
    return final


def mirror_checkpoint(
    path: Path,
    *,
    mirror: Mirror,
    retention: Retention,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Copy a checkpoint to the mirror, make it valid there, and remove older ones. Collective.

    Every rank sends what it wrote, and the marker follows when all have: a checkpoint that is
    only half there is none.

    Args:
        path: From `save_checkpoint`.
        mirror: Where it goes.
        retention: What stays there.
        group: All ranks, for what they tell each other; None is the default group.

    Raises:
        CheckpointNotWritten: On every rank when any rank could not do its part.
    """

    def publish() -> None:
        mirror.mark(path / MARKER)
        there = {n: marker for n, marker in mirror.folders().items() if _NAME.fullmatch(n)}
        whole = [_step(Path(name)) for name, marker in there.items() if marker]
        kept = retention.kept(whole, newest=_step(path))
        for name in there:
            if _step(Path(name)) not in kept:
                mirror.remove(name)

    done = Together(group, complaint=_mirror_complaint(path))
    is_main = dist.get_rank() == 0
    done(lambda: mirror.unmark(path.name), works=is_main)
    done(lambda: mirror.send(_own_files(path)))
    done(publish, works=is_main)


def _write_complaint(path: Path) -> Callable[[str], Exception]:
    return lambda failures: CheckpointNotWritten(
        f"checkpoint {path} could not be written ({failures}); see that the disk has room and can "
        "be written to, and start again"
    )


def _mirror_complaint(path: Path) -> Callable[[str], Exception]:
    return lambda failures: CheckpointNotWritten(
        f"checkpoint {path} could not be copied to the store ({failures}); see that the store "
        "answers, and start again"
    )


def _reach_complaint(failures: str) -> Exception:
    return CheckpointsNotReached(
        f"the store of the checkpoints cannot be read ({failures}); see that it answers, and start "
        "again"
    )


def _leads(*, is_shared: bool) -> bool:
    """Whether this rank looks after a directory, alone for all or alone on its node."""
    return dist.get_rank() == 0 if is_shared else is_first_of_node()


def newest_checkpoint(directory: Path, *, mirror: Mirror | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files are whole; damaged ones are passed over with a warning.

    Collective: without a mirror rank 0 looks, and all ranks get its answer. With one, every node
    brings what it lacks, and takes what is whole on all of them.

    Raises:
        CheckpointsNotReached: On every rank when the mirror does not answer on one.
    """
    if mirror is not None:
        return _newest_on_all_nodes(directory, mirror=mirror)
    found = [_newest_whole(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _newest_on_all_nodes(directory: Path, *, mirror: Mirror) -> Checkpoint | None:
    together = Together(None, complaint=_reach_complaint)

    def candidates() -> dict[str, str]:
        """Names of checkpoints here and there, newest first, with the markers of those there."""
        there = {n: marker for n, marker in mirror.folders().items() if marker}
        names = {path.name for path in _directories(directory)} | set(there)
        by_step = sorted(filter(_NAME.fullmatch, names), key=lambda n: -int(n.partition("_")[2]))
        return {name: there.get(name, "") for name in by_step}

    is_main, leads = dist.get_rank() == 0, _leads(is_shared=False)
    (names,) = together(candidates, works=is_main)
    for name, marker in names.items():
        path = directory / name
        found = together(partial(_brought, path, marker=marker, mirror=mirror), works=leads)
        if found[0] and all(text == found[0] for text in found):
            return _described(path, json.loads(found[0]))
        if is_main:
            logger.warning("checkpoint %s is passed over: it is not whole on every node", path)
    return None


def _brought(path: Path, *, marker: str, mirror: Mirror) -> str:
    """Make a checkpoint whole on this node; the text of its marker, empty where it cannot be.

    Args:
        path: Directory of the checkpoint on this node.
        marker: Text of its marker in the mirror; empty if it is not there.
        mirror: Has what this node lacks.
    """
    is_marked = _text(path / MARKER) == marker if marker else True
    problem = _problem(path) if is_marked else "it is another one than in the store"
    expected = _files(marker)
    if problem and expected:
        path.mkdir(parents=True, exist_ok=True)
        for entry in path.iterdir():
            if entry.name not in expected or _digest(entry) != expected[entry.name]:
                entry.unlink()
        mirror.bring([path / name for name in expected if not (path / name).exists()])
        (path / MARKER).write_text(marker, encoding="utf-8")
        problem = _problem(path)
    if problem:
        logger.warning("checkpoint %s cannot be used here: %s", path, problem)
    return "" if problem else _text(path / MARKER)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _files(marker: str) -> dict[str, str]:
    """Digests of a checkpoint's files by their names; none where a marker is none."""
    try:
        files = json.loads(marker)["files"]
        return {name: str(files[name]) for name in files if Path(name).name == name}
    except (ValueError, KeyError, TypeError):
        return {}


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
            return _described(path, json.loads((path / MARKER).read_text(encoding="utf-8")))
        logger.warning("checkpoint %s is passed over: %s", path, problem)
    return None


def _described(path: Path, marker: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(path=path, step=marker["step"], identity=marker["identity"])


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


def _own_files(path: Path) -> list[Path]:
    """The files of a checkpoint that this rank wrote."""
    own = sorted(path.glob(f"__{dist.get_rank()}_*"))
    return [path / ".metadata", *own] if dist.get_rank() == 0 else own


def _write_marker(partial: Path, *, step: int, identity: str, digests: dict[str, str]) -> None:
    marker = {"step": step, "identity": identity, "files": digests}
    with (partial / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)


def _prune(directory: Path, *, newest: Path, retention: Retention) -> None:
    paths = _directories(directory)
    steps = [_step(path) for path in paths if (path / MARKER).exists()]
    kept = retention.kept(steps, newest=_step(newest))
    for path in paths:
        if _step(path) not in kept:
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
