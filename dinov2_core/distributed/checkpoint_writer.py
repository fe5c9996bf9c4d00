"""CheckpointWriter: checkpoints that training does not wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dinov2_core.distributed.checkpoint import (
    CheckpointNotWritten,
    Retention,
    mirror_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.mirror import Mirror

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Copies a state to host memory and writes the copy in a background thread.

    Training waits for the copy only. At most one write is under way: the next `save` waits for
    it. The copy is made into the same memory every time, pinned where there is CUDA: each rank
    needs as much host memory as its shards take.

    Use as a context manager: leaving it waits for the last write. Every method is collective; the
    threads of the ranks talk in a group of their own.

    Args:
        directory: Of all checkpoints of the run; the same file system on every rank, or on those
            of a node where there is a mirror.
        identity: Of the settings, compared before resuming.
        retention: Which checkpoints stay.
        mirror: Gets a copy of every checkpoint, in the same thread. A copy that fails is warned
            of, unless it is the last one.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: str,
        retention: Retention,
        mirror: Mirror | None = None,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._retention = retention
        self._mirror = mirror
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), group
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._copying: Future[None] | None = None
        is_cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=is_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=is_cuda,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
            logger.exception("the last checkpoint was not written either")
        finally:
            self._thread.shutdown()
            self._stager.close()
            dist.destroy_process_group(self._group)

    def prepare(self, state: Mapping[str, Tensor]) -> None:
        """Get the host memory for the copies, so that the first `save` is as short as the others.

        Args:
            state: As for `save`.
        """
        self._stager.stage(dict(state))

    def save(self, state: Mapping[str, Tensor], *, step: int) -> None:
        """Begin to write a checkpoint; the state may change as soon as this returns.

        Waits for the checkpoint before to be written, though not for its copy in the mirror: that
        goes first in the thread, so that at most one copy and one write are behind.

        Args:
            state: Tensors by name, sharded ones as DTensors; the same tensors every time.
            step: Optimizer steps taken.

        Raises:
            CheckpointNotWritten: The checkpoint before could not be written.
        """
        self._wait_for_write()
        copy = self._stager.stage(dict(state))
        assert isinstance(copy, dict), type(copy)
        self._pending = self._thread.submit(self._write, copy, step=step)
        if self._mirror is not None:
            self._copying = self._thread.submit(self._copy, self._pending, mirror=self._mirror)

    def wait(self) -> None:
        """Return when nothing is being written or copied.

        Raises:
            CheckpointNotWritten: What was being written or copied could not be.
        """
        self._wait_for_write()
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.result()

    def _wait_for_write(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: Mapping[str, Tensor], *, step: int) -> Path:
        started = time.perf_counter()
        path = save_checkpoint(
            state,
            directory=self._directory,
            step=step,
            identity=self._identity,
            retention=self._retention,
            group=self._group,
            is_shared=self._mirror is None,
        )
        logger.debug("wrote %s in %.1f s", path, time.perf_counter() - started)
        return path

    def _copy(self, written: Future[Path], *, mirror: Mirror) -> None:
        if written.exception() is not None:  # told by the write itself
            return
        started = time.perf_counter()
        path = written.result()
        try:
            mirror_checkpoint(path, mirror=mirror, retention=self._retention, group=self._group)
        except CheckpointNotWritten as error:
            if dist.get_rank() == 0:
                logger.warning("%s", error)
            raise
        logger.debug("copied %s in %.1f s", path, time.perf_counter() - started)
