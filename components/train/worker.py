"""One rank of a training, as torchrun starts it: `python -m components.train.worker JOB`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch

from components.runtime.logging import set_up_logging
from components.runtime.manifests import write_atomically
from components.runtime.processes import die_with_parent
from components.train.job import (
    PREEMPTED,
    Job,
    Result,
    last_rows,
    result_file,
    write_failure,
)
from components.train.observation import Collapsed, Observer
from dinov2_core.data.decoding import UnreadableImage
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.training.guard_state import NonFiniteLoss
from dinov2_core.training.loop import TrainingRun

MEAN_STEPS = 50
"""Throughput is the mean over at most this many last steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; exit codes are 0 finished, 75 stopped by SIGTERM with a checkpoint, 2 wrong input."""
    parser = argparse.ArgumentParser(description="One rank of a training.")
    parser.add_argument("job", type=Path, help="job file that the launcher wrote, JSON")
    args = parser.parse_args(argv)
    die_with_parent()
    set_up_logging()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.set())
    job = Job.model_validate_json(args.job.read_text(encoding="utf-8"))
    try:
        return _train(job, stop=stop)
    except (ValueError, NonFiniteLoss, Collapsed, UnreadableImage) as error:
        if isinstance(error, NonFiniteLoss):
            write_atomically(job.diagnosis, json.dumps(asdict(error.diagnosis), indent=2) + "\n")
        _tell(job, error, can_be_fixed=True)
        return 2
    except Exception as error:
        _tell(job, error, can_be_fixed=False)
        raise


def _train(job: Job, *, stop: threading.Event) -> int:
    torch.set_num_threads(job.stage.topology.threads_per_process)
    with process_group(num_replicas=job.stage.topology.num_replicas) as ranks:
        if not ranks.is_main_rank:
            logging.disable(logging.WARNING)
        run = TrainingRun(
            job.stage.learning,
            ranks=ranks,
            checkpoints=job.checkpoints,
            starting_weights=Path(job.starting_weights) if job.starting_weights else None,
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
            _write_result(job, run=run, sha256=sha256)
        return 0 if run.is_finished else PREEMPTED


def _follow(run: TrainingRun, *, job: Job, ranks: Ranks, should_stop: Callable[[], bool]) -> None:
    """Take the steps and look at the teacher in between, on every rank; the main rank records."""
    steps = run.steps(
        shards=Path(job.shards),
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


def _write_result(job: Job, *, run: TrainingRun, sha256: str) -> None:
    """Leave the numbers for the launcher; they come from the disk, where earlier attempts are."""
    rows = last_rows(job.metrics, MEAN_STEPS)
    taken = [row for row in rows if "loss/total" in row]  # a skipped step may have no loss
    losses = {k: v for k, v in taken[-1].items() if k.startswith("loss/")} if taken else {}
    result = Result(
        is_finished=run.is_finished,
        step=run.num_steps_done,
        final_losses={name.removeprefix("loss/"): value for name, value in losses.items()},
        images_per_second=fmean(row["speed/images_per_second"] for row in rows) if rows else 0.0,
        teacher_sha256=sha256,
    )
    write_atomically(result_file(job.root), result.model_dump_json(indent=2) + "\n")


def _tell(job: Job, error: Exception, *, can_be_fixed: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    write_failure(job.root, rank=rank, error=error, can_be_fixed=can_be_fixed)


if __name__ == "__main__":
    sys.exit(main())
