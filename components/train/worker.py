"""One rank of a training, as torchrun starts it: `python -m components.train.worker JOB`."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean

import torch

from components.ranks.worker_main import run_rank
from components.runtime.manifests import write_atomically
from components.runtime.progress import Reporter
from components.runtime.storage import download, download_if_newer, local_path, upload, write_text
from components.train.job import CHECKPOINTS, Job, Result, last_rows, write_result
from components.train.observation import Observer
from components.train.remote_checkpoints import remote_checkpoints_of
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import NonFiniteLoss
from dinov2_core.training.guard_state import Diagnosis
from dinov2_core.training.loop import TrainingRun

MEAN_STEPS = 50
"""Throughput is the mean over at most this many last steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; exit codes are 0 finished, 75 stopped by SIGTERM with a checkpoint, 2 wrong input."""
    return run_rank(argv, kind=Job, work=_train)


def _train(job: Job, stop: threading.Event) -> bool:
    try:
        return _take_steps(job, stop)
    except NonFiniteLoss as error:
        assert isinstance(error.diagnosis, Diagnosis), error.diagnosis
        text = json.dumps(asdict(error.diagnosis), indent=2) + "\n"
        write_text(job.uri_of(job.diagnosis), text)
        raise


def _take_steps(job: Job, stop: threading.Event) -> bool:
    torch.set_num_threads(job.stage.topology.threads_per_process)
    _fetch_inputs(job)
    with process_group(num_replicas=job.stage.topology.num_replicas) as ranks:
        run = TrainingRun(
            job.stage.learning,
            ranks=ranks,
            checkpoints=job.checkpoints,
            remote=remote_checkpoints_of(job),
            starting_weights=local_path(job.starting_weights) if job.starting_weights else None,
        )
        if ranks.is_main_rank and run.starting_report is not None:
            report = run.starting_report
            source = job.stage.initial_weights or job.starting_weights
            told = f"{source}: {report.summary}\n\n{report.text()}"
            write_atomically(job.starting_report, told)
        if not run.is_finished:
            _follow(run, job=job, ranks=ranks, should_stop=stop.is_set)
        sha256 = run.export_teacher(job.teacher) if run.is_finished else ""
        if ranks.is_main_rank:
            upload(job.root, job.directory, leaving_out=[CHECKPOINTS])
            write_result(job, _result(job, run=run, sha256=sha256))
        return run.is_finished


def _fetch_inputs(job: Job) -> None:
    """Bring to this node what the job reads, and to the main rank's what it goes on with."""
    is_main_rank = os.environ.get("RANK", "0") == "0"
    report = Reporter(job.progress if is_main_rank else None, stage=job.phase)

    def progress(done: int, total: int) -> None:
        if total:
            report("fetching shards", done // 10**6, total // 10**6, unit="megabyte")

    download(job.shards, progress=progress)
    if job.starting_weights:
        download(job.starting_weights)
    if is_main_rank:
        for place in (job.metrics, job.health):
            download_if_newer(job.uri_of(place))


def _follow(run: TrainingRun, *, job: Job, ranks: Ranks, should_stop: Callable[[], bool]) -> None:
    """Take the steps and look at the teacher in between, on every rank; the main rank records."""
    steps = run.steps(
        shards=job.images,
        loader_threads=job.stage.topology.loader_threads,
        should_stop=should_stop,
    )
    observer = Observer(job, run=run, ranks=ranks)
    if not ranks.is_main_rank:
        for report in steps:
            observer(report)
            if report.writes_checkpoint:
                observer.patches_of_pictured()
        return
    from components.train.record import Record  # MLflow and pictures only on the main rank

    with Record(job, observer=observer, first_step=run.first_step) as record:
        record.take(steps, observer=observer)


def _result(job: Job, *, run: TrainingRun, sha256: str) -> Result:
    """The numbers for the launcher; they come from the disk, where earlier attempts are."""
    rows = last_rows(job.metrics, MEAN_STEPS)
    taken = [row for row in rows if "loss/total" in row]  # a skipped step may have no loss
    losses = {k: v for k, v in taken[-1].items() if k.startswith("loss/")} if taken else {}
    return Result(
        is_finished=run.is_finished,
        step=run.num_steps_done,
        final_losses={name.removeprefix("loss/"): value for name, value in losses.items()},
        images_per_second=fmean(row["speed/images_per_second"] for row in rows) if rows else 0.0,
        teacher_sha256=sha256,
    )


if __name__ == "__main__":
    sys.exit(main())
