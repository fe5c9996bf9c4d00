"""CheckpointWriter: writes checkpoints behind the training."""

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

from dinov2_core.config.execution import Checkpoints
from dinov2_core.distributed.checkpoint import save_checkpoint
from dinov2_core.distributed.remote_checkpoints import RemoteCheckpoints, upload_checkpoint
from dinov2_core.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Copies a state to host memory and writes the copy in a background thread.

    Training waits for the copy only. At most one write is under way: the next `save` waits for
    it. The copy is made into the same memory every time, pinned where there is CUDA: each rank
    needs as much host memory as its shards take.

    Use as a context manager: leaving it waits for the last write. Every method is collective; the
    threads of the ranks use a group of their own.

    Args:
        directory: Of all checkpoints of the run; the same file system on every rank, or on those
            of a node where there is a remote store.
        identity: Of the settings, compared before resuming.
        retention: Which checkpoints stay.
        remote: Every checkpoint is uploaded there, in the same thread; None uploads none. A failed
            upload is a warning, that of the last checkpoint an error.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: str,
        retention: Checkpoints,
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._retention = retention
        self._remote = remote
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), group
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._uploading: Future[None] | None = None
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

        Waits until the checkpoint before is written, though not for its upload: that goes first in
        the thread, so that at most one upload and one write are behind.

        Args:
            state: Tensors by name, sharded ones as DTensors; the same tensors every time.
            step: Optimizer steps taken.

        Raises:
            CheckpointError: The checkpoint before could not be written.
        """
        self._wait_for_write()
        copy = self._stager.stage(dict(state))
        assert isinstance(copy, dict), type(copy)
        self._pending = self._thread.submit(self._write, copy, step=step)
        if self._remote is not None:
            self._uploading = self._thread.submit(self._upload, self._pending, remote=self._remote)

    def wait(self) -> None:
        """Wait until nothing is being written or uploaded.

        Raises:
            CheckpointError: What was being written or uploaded could not be.
        """
        self._wait_for_write()
        uploading, self._uploading = self._uploading, None
        if uploading is not None:
            uploading.result()

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
            is_shared=self._remote is None,
        )
        logger.debug("wrote %s in %.1f s", path, time.perf_counter() - started)
        return path

    def _upload(self, written: Future[Path], *, remote: RemoteCheckpoints) -> None:
        if written.exception() is not None:  # raised where the write is waited for
            return
        started = time.perf_counter()
        path = written.result()
        try:
            upload_checkpoint(path, remote=remote, retention=self._retention, group=self._group)
        except CheckpointError as error:
            if dist.get_rank() == 0:
                logger.warning("%s", error)
            raise
        logger.debug("uploaded %s in %.1f s", path, time.perf_counter() - started)
