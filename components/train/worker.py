"""One rank of a training, as torchrun starts it: `python -m components.train.worker JOB`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch

from components.runtime.logging import set_up_logging
from components.runtime.manifests import write_atomically
from components.runtime.processes import die_with_parent
from components.runtime.progress import Reporter
from components.train.job import (
    PREEMPTED,
    Job,
    Result,
    last_rows,
    result_file,
    write_failure,
)
from dinov2_core.data.decoding import UnreadableImage
from dinov2_core.distributed.mesh import process_group
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.step_report import NonFiniteLoss, StepReport

LOSS_TERMS = ("total", "dino_local", "dino_global", "ibot", "koleo")
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
    except (ValueError, NonFiniteLoss, UnreadableImage) as error:
        _tell(job, error, can_be_fixed=True)
        return 2
    except Exception as error:
        _tell(job, error, can_be_fixed=False)
        raise


def _train(job: Job, *, stop: threading.Event) -> int:
    torch.set_num_threads(job.stage.topology.threads_per_process)
    with process_group() as ranks:
        if not ranks.is_main_rank:
            logging.disable(logging.WARNING)
        run = TrainingRun(
            job.stage.learning,
            ranks=ranks,
            checkpoints=job.checkpoints,
            starting_weights=Path(job.starting_weights) if job.starting_weights else None,
        )
        steps = run.steps(
            shards=Path(job.shards),
            loader_threads=job.stage.topology.loader_threads,
            should_stop=stop.is_set,
        )
        if ranks.is_main_rank:
            _record(steps, job=job, first_step=run.first_step)
        else:
            deque(steps, maxlen=0)
        sha256 = run.export_teacher(job.teacher) if run.is_finished else ""
        if ranks.is_main_rank:
            _write_result(job, run=run, sha256=sha256)
        return 0 if run.is_finished else PREEMPTED


def _record(steps: Iterable[StepReport], *, job: Job, first_step: int) -> None:
    """Take the steps; metrics are safe before the checkpoint that follows them exists."""
    from components.train.recorder import open_recorder  # MLflow only on the main rank

    progress = Reporter(job.context.progress_directory / f"{job.phase}.json", stage=job.phase)
    num_steps = job.stage.learning.optimization.num_steps
    rates: deque[float] = deque(maxlen=MEAN_STEPS)
    with open_recorder(job, first_step=first_step) as recorder:
        for report in steps:
            recorder.add(report.step, metrics_of(report))
            rates.append(report.images_per_second)
            progress(
                "training",
                report.step + 1,
                num_steps,
                unit="step",
                rate=fmean(rates),
                detail=f"loss {report.losses['total']:.2f}",
            )
            if report.writes_checkpoint:
                recorder.flush()


def metrics_of(report: StepReport) -> dict[str, float]:
    """Everything about a step under the names that MLflow shows."""
    return {
        **{f"loss/{name}": report.losses[name] for name in LOSS_TERMS},
        "teacher/entropy": report.losses["teacher_entropy"],
        "teacher/prototype_usage": report.losses["prototype_usage"],
        "teacher/momentum": report.schedule.teacher_momentum,
        "teacher/temperature": report.schedule.teacher_temperature,
        **{f"gradient_norm/{name}": norm for name, norm in report.gradient_norms.items()},
        "schedule/learning_rate": report.schedule.learning_rate,
        "schedule/weight_decay": report.schedule.weight_decay,
        "speed/images_per_second": report.images_per_second,
        "speed/step_seconds": report.seconds,
        "speed/data_seconds": report.data_seconds,
    }


def _write_result(job: Job, *, run: TrainingRun, sha256: str) -> None:
    """Leave the numbers for the launcher; they come from the disk, where earlier attempts are."""
    rows = last_rows(job.metrics, MEAN_STEPS)
    losses = {k: v for k, v in rows[-1].items() if k.startswith("loss/")} if rows else {}
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
