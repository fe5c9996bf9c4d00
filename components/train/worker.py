"""One rank of a training, as torchrun starts it: `python -m components.train.worker JOB`."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from components.ranks.worker_main import worker_process
from components.runtime.manifests import write_atomically
from components.runtime.metric_rows import last_rows
from components.runtime.progress import Reporter
from components.runtime.storage import download, download_if_newer, local_path, upload, write_text
from components.train.job import CHECKPOINTS, Job, Result, write_result
from components.train.probe import knn_probe
from components.train.remote_checkpoints import remote_checkpoints_of
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import ExitCode, NonFiniteLoss
from dinov2_core.training.guard_state import Diagnosis
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.teacher_monitor import TeacherMonitor

if TYPE_CHECKING:
    from components.train.reporter import TrainingReporter

MEAN_ROWS = 50
"""Throughput is the mean over at most this many last rows of metrics."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; exit codes are 0 finished, 75 stopped by SIGTERM with a checkpoint, 2 user error."""
    with worker_process(argv, kind=Job) as (job, stop):
        return ExitCode.DONE if train(job, stop=stop) else ExitCode.STOPPED


def train(job: Job, *, stop: threading.Event) -> bool:
    """Train from the job's newest checkpoint on; whether all steps were taken. Collective.

    Between `main` and the loss there are few frames, so that a traceback shows the method.
    """
    torch.set_num_threads(job.stage.topology.threads_per_process)
    _download_inputs(job)
    with (
        process_group(num_replicas=job.stage.topology.num_replicas) as ranks,
        _diagnosis_written(job),
    ):
        run = TrainingRun(
            job.stage.learning,
            ranks=ranks,
            checkpoints=job.checkpoints,
            remote=remote_checkpoints_of(job),
            starting_weights=local_path(job.starting_weights) if job.starting_weights else None,
        )
        _write_weights_report(job, run=run, ranks=ranks)
        monitor = TeacherMonitor(
            job.stage.learning,
            run=run,
            ranks=ranks,
            images=job.images,
            probe=knn_probe(job.stage.probe) if job.stage.probe else None,
        )
        with _reporter(job, run=run, ranks=ranks, monitor=monitor) as reporter:
            for report in run.steps(
                shards=job.images,
                loader_threads=job.stage.topology.loader_threads,
                should_stop=stop.is_set,
            ):
                if reporter is not None:
                    reporter.end_profile()
                measurement = monitor.measure(report)
                patch_tokens = monitor.patch_tokens() if report.writes_checkpoint else None
                if reporter is not None:
                    reporter.record(report, measurement=measurement, patch_tokens=patch_tokens)
        sha256 = run.export_teacher(job.teacher) if run.is_finished else ""
        if ranks.is_main_rank:
            upload(job.root, job.directory, leaving_out=[CHECKPOINTS])
            write_result(job, _result(job, run=run, sha256=sha256))
        return run.is_finished


def _reporter(
    job: Job, *, run: TrainingRun, ranks: Ranks, monitor: TeacherMonitor
) -> AbstractContextManager[TrainingReporter | None]:
    """The main rank's reporter, which loads MLflow and drawing; None on the other ranks."""
    if not ranks.is_main_rank:
        return nullcontext()
    from components.train.reporter import TrainingReporter

    return TrainingReporter(job, monitor=monitor, first_step=run.first_step)


@contextmanager
def _diagnosis_written(job: Job) -> Iterator[None]:
    """Write which numbers of which images were not finite, if that ends the training."""
    try:
        yield
    except NonFiniteLoss as error:
        assert isinstance(error.diagnosis, Diagnosis), error.diagnosis
        text = json.dumps(asdict(error.diagnosis), indent=2) + "\n"
        write_text(job.uri_of(job.diagnosis), text)
        raise


def _write_weights_report(job: Job, *, run: TrainingRun, ranks: Ranks) -> None:
    """Write which starting weights were loaded, if any were."""
    report = run.starting_report
    if ranks.is_main_rank and report is not None:
        source = job.stage.initial_weights or job.starting_weights
        write_atomically(job.weights_report, f"{source}: {report.summary}\n\n{report.text()}")


def _download_inputs(job: Job) -> None:
    """Download to this node what the job reads, and on the main rank what it continues."""
    is_main_rank = os.environ.get("RANK", "0") == "0"
    report = Reporter(job.progress if is_main_rank else None, stage=job.stage_name)

    def progress(done: int, total: int) -> None:
        if total:
            report("downloading shards", done // 10**6, total // 10**6, unit="megabyte")

    download(job.shards, progress=progress)
    if job.starting_weights:
        download(job.starting_weights)
    if is_main_rank:
        for path in (job.metrics, job.health):
            download_if_newer(job.uri_of(path))


def _result(job: Job, *, run: TrainingRun, sha256: str) -> Result:
    """The numbers for the launcher, from the disk: earlier attempts count too."""
    rows = last_rows(job.metrics, MEAN_ROWS)
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
