"""What a person sees of a run: a live table on a terminal, a summary at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from components.runtime.progress import Progress, duration
from pipelines.spec.pipeline_spec import STAGES

MARKS = {
    "running": "[cyan]●[/]",
    "succeeded": "[green]✔[/]",
    "cached": "[green]↺[/]",
    "failed": "[red]✘[/]",
}


def read_progress(directory: Path, stage: str) -> Progress | None:
    """What a stage last said of itself; None before it has started."""
    try:
        text = (directory / f"{stage}.json").read_text(encoding="utf-8")
        return Progress.model_validate_json(text)
    except (OSError, ValidationError):
        return None


def progress_table(directory: Path) -> Table:
    """One row per stage: what it does, how far it is, how fast, how long it still takes."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    for stage in STAGES:
        progress = read_progress(directory, stage)
        if progress is None:
            table.add_row("[dim]○[/]", f"[dim]{stage}[/]")
            continue
        mark = MARKS[progress.state]
        if progress.state != "running":
            note = "taken over from an earlier run" if progress.state == "cached" else ""
            note = progress.detail if progress.state == "failed" else note
            table.add_row(mark, stage, escape(note), "", duration(progress.seconds))
            continue
        bar = ProgressBar(total=max(progress.total, 1), completed=progress.done, width=24)
        counts = f"{progress.done}/{progress.total} {progress.unit}s" if progress.total else ""
        numbers = [counts, progress.detail]
        if progress.rate:
            numbers.append(f"{progress.rate:.0f} images/s")
        left = f"{duration(progress.seconds_left)} left" if progress.seconds_left else ""
        table.add_row(
            mark, stage, progress.task, bar, escape(" · ".join(n for n in numbers if n)), left
        )
    return table


def summary_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """The end of a run: per stage its time, its key numbers and where its outputs lie.

    Args:
        rows: Stage, time, numbers, place.
    """
    table = Table(title=None, header_style="bold")
    for heading in ("stage", "time", "key numbers", "outputs"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def console() -> Console:
    """Standard output as it is now; wide enough for a table where there is no terminal."""
    made = Console(file=sys.stdout, highlight=False)
    return made if made.is_terminal else Console(file=sys.stdout, width=140, highlight=False)
