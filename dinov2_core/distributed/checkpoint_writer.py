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

from dinov2_core.distributed.checkpoint import Retention, save_checkpoint

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Copies a state to host memory and writes the copy in a background thread.

    Training waits for the copy only. At most one write is under way: the next `save` waits for
    it. The copy is made into the same memory every time, pinned where there is CUDA: each rank
    needs as much host memory as its shards take.

    Use as a context manager: leaving it waits for the last write. Every method is collective; the
    threads of the ranks talk in a group of their own.

    Args:
        directory: Of all checkpoints of the run; the same file system on every rank. An upload to
            an object store would follow `save_checkpoint` in `_write`, in the same thread.
        identity: Of the settings, compared before resuming.
        retention: Which checkpoints stay.
    """

    def __init__(self, directory: Path, *, identity: str, retention: Retention) -> None:
        self._directory = directory
        self._identity = identity
        self._retention = retention
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), group
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
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

        Args:
            state: Tensors by name, sharded ones as DTensors; the same tensors every time.
            step: Optimizer steps taken.

        Raises:
            CheckpointNotWritten: The checkpoint before could not be written.
        """
        self.wait()
        copy = self._stager.stage(dict(state))
        assert isinstance(copy, dict), type(copy)
        self._pending = self._thread.submit(self._write, copy, step=step)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointNotWritten: What was being written could not be.
        """
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
        )
        logger.debug("wrote %s in %.1f s", path, time.perf_counter() - started)
        return path
