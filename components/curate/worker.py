"""One rank that embeds, as torchrun starts it: `python -m components.curate.worker JOB`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

import torch

from components.curate.embedder import embedder_of
from components.curate.job import EmbeddingJob, ImageSet
from components.curate.stored_images import StoredImages
from components.ranks.worker_main import worker_process
from components.runtime.progress import Reporter
from components.runtime.storage import upload
from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.scanning import scan_block
from dinov2_core.errors import ExitCode, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Embed; exit codes are 0 finished, 75 stopped by SIGTERM after a block, 2 wrong input."""
    with worker_process(argv, kind=EmbeddingJob) as (job, stop):
        return ExitCode.DONE if _embed(job, stop) else ExitCode.STOPPED


def _embed(job: EmbeddingJob, stop: threading.Event) -> bool:
    """Scan the blocks of this rank that are not saved yet, and save each at once."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    report = Reporter(None if rank else job.progress, stage=job.stage_name)
    torch.set_num_threads(job.topology.threads_per_process)
    share = job.blocks()[rank::num_ranks]
    finished = job.finished_blocks()
    left = [block for block in share if block.name not in finished]
    files = {one.role: _opened(one) for one in job.sets}
    embedder = embedder_of(job.settings.embedding, local_rank=int(os.environ["LOCAL_RANK"]))
    total = sum(len(block.numbers) for block in share)
    done = total - sum(len(block.numbers) for block in left)
    for block in left:
        report(job.work, done, total, detail=f"first of {num_ranks} ranks")
        if stop.is_set():
            return False
        table = scan_block(
            files[block.role],
            block.numbers,
            embedder=embedder,
            min_side_pixels=job.settings.min_side_pixels,
            num_threads=job.topology.loader_threads,
        )
        path = job.path_of(block)
        write_table(table, path)
        upload(path, job.uri_of(path))
        done += len(block.numbers)
    report(job.work, done, total, detail=f"first of {num_ranks} ranks")
    return True


def _opened(images: ImageSet) -> StoredImages:
    """The files of a set.

    Raises:
        InputError: There are more or fewer than when the job was made.
    """
    files = StoredImages(images.uris)
    if len(files) != images.num_files:
        raise InputError(
            f"{', '.join(images.uris)} holds {len(files)} files on this node, and held "
            f"{images.num_files} for the step that started this rank; use storage that all nodes "
            "share, and start again when the files no longer change"
        )
    return files


if __name__ == "__main__":
    sys.exit(main())
