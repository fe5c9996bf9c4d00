"""Measures the training step beside a naive one and the machine's peak: `make bench`.

The sides take turns, so that a machine whose speed drifts drifts for all of them; what is
compared are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import track
from rich.table import Table

from components.runtime.processes import COMPUTING
from tests.bench.contestant import PROFILE
from tests.bench.workload import training_config

NUM_STEPS = {"product": 3, "naive": 2, "bf16": 12, "fp32": 6}
"""Of a turn, in the order of the turns."""
NUM_SHOWN = 12
"""Operators in the printed profile."""
MIN_SPEEDUP, MAX_MEMORY, MIN_OF_PEAK = 2.0, 0.5, 0.5


class Side:
    """A contestant's process."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "tests.bench.contestant", name]
        environment = COMPUTING | os.environ | {"KINETO_LOG_LEVEL": "99"}  # quiet profiler
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.name = name
        counted = self._answer()
        self.num_flops: int = counted["num_flops"]
        self.tensor_bytes: int = counted["tensor_bytes"]
        self.operators: list[dict[str, Any]] = []
        self.rounds: list[list[dict[str, float]]] = []
        self.process_bytes = 0

    def take_turn(self) -> None:
        """A few steps."""
        answer = self._asked(f"{NUM_STEPS[self.name]}")
        self.rounds.append(answer["phases"])
        self.process_bytes = answer["process_bytes"]

    def take_profile(self) -> None:
        """One more step, under the profiler."""
        self.operators = self._asked(PROFILE)["operators"]

    def _asked(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def seconds(self, phase: str = "total") -> list[float]:
        """Per round, the median over its steps."""
        return [median(step[phase] for step in steps) for steps in self.rounds]

    def flops_per_second(self) -> list[float]:
        """Per round."""
        return [self.num_flops / seconds for seconds in self.seconds()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One side of the table."""

    name: str
    images_per_second: float
    gflops_per_step: float
    gflops_per_second: float
    share_of_bf16_peak: float
    tensor_memory_mib: float
    """Most that tensors held at once, as an allocator is asked for it."""
    process_memory_mib: float
    """Most that the process grew by: with what malloc keeps and kernels use inside."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the bars, write them to a file; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description="Benchmark of one training step.")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(name)) for name in NUM_STEPS]
        for side in track([*sides * (1 + args.rounds)], description="turns"):
            side.take_turn()
        for side in sides[:2]:
            side.take_profile()
    for side in sides:
        del side.rounds[0]  # the first steps allocate
    return report(sides, output=args.output)


def report(sides: list[Side], *, output: Path) -> int:
    """Table, bars and the split of the product's step."""
    product, naive, bf16, _ = sides
    speedup = ratio(naive.seconds(), product.seconds())
    memory = product.tensor_bytes / naive.tensor_bytes
    of_peak = ratio(product.flops_per_second(), bf16.flops_per_second())
    bars = {
        "images/s, product over naive": (speedup, speedup >= MIN_SPEEDUP, f">= {MIN_SPEEDUP}"),
        "memory of tensors, product over naive": (memory, memory <= MAX_MEMORY, f"<= {MAX_MEMORY}"),
        "share of the bf16 peak": (of_peak, of_peak >= MIN_OF_PEAK, f">= {MIN_OF_PEAK}"),
    }
    rows = [row(side, peak=bf16) for side in sides]
    phases = {
        phase: median(product.seconds(phase)) / median(product.seconds())
        for phase in product.rounds[0][0]
        if phase != "total"
    }
    output.write_text(
        json.dumps(
            {
                "settings": training_config().model_dump(mode="json"),
                "rows": [asdict(one) for one in rows],
                "bars": {
                    name: {"value": v, "holds": h, "bar": b} for name, (v, h, b) in bars.items()
                },
                "product_phases": phases,
                "operators": {side.name: side.operators for side in (product, naive)},
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    show(rows, bars=bars, phases=phases)
    show_operators(product)
    return 0 if all(holds for _, holds, _ in bars.values()) else 1


def show(
    rows: list[Row], *, bars: dict[str, tuple[float, bool, str]], phases: dict[str, float]
) -> None:
    """For a person."""
    console = Console()
    table = Table(
        title="one training step, ViT-S/14, 8 images, 2 x 224 + 8 x 98, 65,536 prototypes"
    )
    for heading in (
        "",
        "images/s",
        "GFLOP/step",
        "GFLOP/s",
        "of bf16 peak",
        "MiB tensors",
        "MiB process",
    ):
        table.add_column(heading, justify="right")
    for one in rows:
        images = f"{one.images_per_second:.2f}" if one.images_per_second else ""
        table.add_row(
            one.name,
            images,
            f"{one.gflops_per_step:.0f}",
            f"{one.gflops_per_second:.0f}",
            f"{one.share_of_bf16_peak:.2f}",
            f"{one.tensor_memory_mib:.0f}",
            f"{one.process_memory_mib:.0f}",
        )
    console.print(table)
    for name, (value, holds, bar) in bars.items():
        console.print(f"{'holds ' if holds else 'MISSED'} {name}: {value:.2f} ({bar})")
    split = ", ".join(f"{name} {share:.0%}" for name, share in phases.items())
    console.print(f"where the product's step goes: {split}")


def show_operators(side: Side) -> None:
    """The profile of a step."""
    table = Table(title=f"operators of one step by their own time: {side.name}")
    for heading in ("", "calls", "share", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for one in side.operators[:NUM_SHOWN]:
        speed = one["gflops_per_second"]
        table.add_row(
            one["name"], str(one["calls"]), f"{one['share']:.1%}", f"{speed:.0f}" if speed else ""
        )
    Console().print(table)


def row(side: Side, *, peak: Side) -> Row:
    """Figures of a side."""
    is_training = side.name in ("product", "naive")
    batch = training_config().optimization.global_batch_size
    return Row(
        name=side.name,
        images_per_second=batch / median(side.seconds()) if is_training else 0.0,
        gflops_per_step=side.num_flops / 1e9,
        gflops_per_second=median(side.flops_per_second()) / 1e9,
        share_of_bf16_peak=ratio(side.flops_per_second(), peak.flops_per_second()),
        tensor_memory_mib=side.tensor_bytes / 2**20,
        process_memory_mib=side.process_bytes / 2**20,
    )


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return median(n / d for n, d in zip(numerators, denominators, strict=True))


if __name__ == "__main__":
    sys.exit(main())
