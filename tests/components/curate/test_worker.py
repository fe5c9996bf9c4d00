"""worker: ranks that embed lose no more than the block at hand, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from components.curate.job import EmbeddingJob
from components.ranks.job import first_failure
from components.ranks.local_launcher import run_ranks
from components.runtime.processes import exclusive_directory
from components.runtime.progress import Progress
from dinov2_core.curation.scanning import BLOCK_FILES
from dinov2_core.errors import ExitCode, StageFailed, Stopped

JobOn = Callable[..., EmbeddingJob]


def ranks() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.cmdline()[1:4] == ["-u", "-m", "components.curate.worker"]]


@contextmanager
def once_a_block_is_saved(job: EmbeddingJob, act: Callable[[], None]) -> Iterator[None]:
    """Do something from another thread as soon as the ranks have saved a block."""

    def watch() -> None:
        while not job.finished_blocks() and not gone.wait(0.01):
            pass
        act()

    gone = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        gone.set()
        watcher.join()


def run(job: EmbeddingJob) -> None:
    with exclusive_directory(job.root) as lock:
        run_ranks(job, lock=lock)


def times(job: EmbeddingJob) -> dict[Path, int]:
    blocks = [job.path_of(block) for block in job.blocks()]
    return {path: path.stat().st_mtime_ns for path in blocks if path.exists()}


def test_killed_ranks_go_on_with_the_blocks_that_are_not_saved(job_on: JobOn) -> None:
    job = job_on(16 * BLOCK_FILES)

    def kill() -> None:
        for rank in ranks():
            rank.kill()

    with (
        once_a_block_is_saved(job, kill),
        pytest.raises(
            StageFailed, match="was killed .* start again to continue from what they saved"
        ),
    ):
        run(job)
    before = times(job)
    assert 0 < len(before) < 16
    run(job)
    after = times(job)
    assert len(after) == 16
    assert before.items() <= after.items(), "finished blocks stay as they are"
    progress = Progress.model_validate_json(job.progress.read_text())
    assert (progress.task, progress.done, progress.total) == ("embedding", 4096, 4096)
    assert progress.detail == "first of 2 ranks"


def test_stopped_ranks_finish_their_block(job_on: JobOn) -> None:
    job = job_on(16 * BLOCK_FILES, num_ranks=1)
    with (
        once_a_block_is_saved(job, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(Stopped, match=r"^stopped after \d+ of 16 blocks of images; start again"),
    ):
        run(job)
    assert 0 < len(job.finished_blocks()) < 16


def test_sources_that_changed_are_refused(job_on: JobOn) -> None:
    job = job_on(3)
    more = job.sets[0].model_copy(update={"num_files": 4})
    job = job.model_copy(update={"sets": (more,)})
    job.write()
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", job.worker, job.uri]
    assert (
        subprocess.run(command, env=os.environ | rank, check=False).returncode
        == ExitCode.USER_ERROR
    )
    failure = first_failure(job.directory)
    assert failure is not None
    assert failure.is_user_error
    assert "images.parquet holds 3 files on this node, and held 4" in failure.message
