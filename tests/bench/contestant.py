"""One side of the measurement in a process of its own: `python -m tests.bench.contestant NAME`.

Reads a number of steps per line, or the word profile, and answers with one JSON object per line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.mesh import process_group
from dinov2_core.planning.cost_tracker import CostTracker
from dinov2_core.training.batches import mask_recipe
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.schedules import schedule_at
from tests.bench.naive import NaiveTrainer
from tests.bench.workload import training_config, write_shards

NUM_THREADS = 2
NUM_OPERATORS = 20
PROFILE = "profile"
"""The line that asks for a profile."""
MATRIX_SIDE = 2048
Phases = dict[str, float]


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(NUM_THREADS)
    contestant = {"product": product, "naive": naive, "bf16": matrices, "fp32": matrices}[
        sys.argv[1]
    ]
    baseline = memory_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        write_shards(shards)
        steps = contestant(shards)
        with CostTracker() as tracker:
            next(steps)
            tracker.restart("other")
            next(steps)
        tell(num_flops=counted_flops(lambda: next(steps)), tensor_bytes=tracker.peak.peak_bytes)
        for line in sys.stdin:
            if line.strip() == PROFILE:
                tell(operators=profiled_operators(lambda: next(steps)))
                continue
            phases = [next(steps) for _ in range(int(line))]
            tell(
                phases=phases,
                process_bytes=memory_bytes("VmHWM") - baseline,
            )


def product(shards: Path) -> Iterator[Phases]:
    """Steps of the training run itself, with its loader beside it.

    Without the copy of the state that checkpoints are written from: the naive side writes none.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        process_group() as ranks,
        ShardReader(shards) as reader,
    ):
        run = TrainingRun(
            training_config(), ranks=ranks, checkpoints=Path(folder), starting_weights=None
        )
        with run._loader(reader, num_threads=1) as loader:
            while True:
                started = time.perf_counter()
                taken = run._step(loader, should_stop=lambda: False)
                run.num_steps_done += 1
                report, _ = run._report(
                    deque([taken]), loader=loader, started=started, must_stop=False
                )
                yield {"total": report.seconds, **report.phase_seconds}


def naive(shards: Path) -> Iterator[Phases]:
    """Steps of the naive trainer on batches of the same loader."""
    config = training_config()
    trainer = NaiveTrainer(config)
    with (
        ShardReader(shards) as reader,
        PretrainLoader(
            reader,
            crops=config.crops,
            masks=mask_recipe(config),
            seed=config.seed,
            global_batch_size=config.optimization.global_batch_size,
            rank=0,
            world_size=1,
            start_step=0,
            num_threads=1,
        ) as loader,
    ):
        for step, batch in enumerate(loader):
            started = time.perf_counter()
            trainer.step(batch, schedule=schedule_at(step, config=config))
            yield {"total": time.perf_counter() - started}


def matrices(_: Path) -> Iterator[Phases]:
    """Products of two square matrices: what this machine can do at best."""
    dtype = torch.bfloat16 if sys.argv[1] == "bf16" else torch.float32
    left, right = (torch.randn(MATRIX_SIDE, MATRIX_SIDE).to(dtype) for _ in range(2))
    while True:
        started = time.perf_counter()
        left @ right
        yield {"total": time.perf_counter() - started}


def counted_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def profiled_operators(step: Callable[[], object]) -> list[dict[str, object]]:
    """Operators of one step by their own time: name, calls, share of all, and the same of FLOPs."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as measured:
        step()
    operators = sorted(measured.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in operators)
    return [
        {
            "name": one.key,
            "calls": one.count,
            "share": one.self_cpu_time_total / total,
            "gflops_per_second": one.flops / one.self_cpu_time_total / 1e3,
        }
        for one in operators[:NUM_OPERATORS]
    ]


def memory_bytes(name: str) -> int:
    """A figure of this process from the kernel: VmRSS now, VmHWM the most there was."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def tell(**values: object) -> None:
    """One line for the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
