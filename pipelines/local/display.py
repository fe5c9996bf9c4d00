"""What a user sees of a run: where its files are, its progress, a summary at the end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from components.runtime.context import RunContext
from components.runtime.progress import Progress, duration
from pipelines.spec.pipeline_spec import STAGES

MARKS = {
    "running": "[cyan]●[/]",
    "succeeded": "[green]✔[/]",
    "cached": "[green]↺[/]",
    "failed": "[red]✘[/]",
}


def discard_output() -> None:
    """Let standard output go nowhere once its reader, such as `head`, has closed it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.close(nowhere)


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Go on: the log and run.json hold everything."""
        discard_output()


def console() -> Console:
    """Standard output as it is now; wide enough for a table where there is no terminal."""
    made = _Screen(file=sys.stdout, highlight=False)
    return made if made.is_terminal else _Screen(file=sys.stdout, width=140, highlight=False)


class RunDisplay:
    """Shows a run: every line of its stages, or on a terminal a table that is kept up to date.

    Args:
        screen: Where to show it.
        live: The table; None without a terminal.
    """

    def __init__(self, screen: Console, live: Live | None = None) -> None:
        self._screen = screen
        self._live = live
        self._progress: Path | None = None

    def start(self, context: RunContext, *, log: Path) -> None:
        """Show where the files of a run are."""
        self._progress = context.progress_directory
        health = context.root / "stages" / "pretrain" / "*" / "health" / "health.html"
        self._screen.out(
            f"log: {log}\n"
            f"health page, once training has begun: {health}\n"
            f"MLflow: {mlflow_hint(context.resolved_tracking_uri)}"
        )

    def line(self, text: str) -> None:
        """Show a line that a stage printed."""
        if self._live is None:
            self._screen.out(text)

    def refresh(self) -> None:
        """Show the progress of the stages."""
        if self._live is not None and self._progress is not None:
            self._live.update(progress_table(self._progress))


@contextmanager
def run_display(screen: Console) -> Iterator[RunDisplay]:
    """A display that is live where the screen is a terminal."""
    if not screen.is_terminal:
        yield RunDisplay(screen)
        return
    with Live(console=screen, refresh_per_second=4, redirect_stdout=False) as live:
        yield RunDisplay(screen, live)


def mlflow_hint(uri: str) -> str:
    """How to look at runs and models: the server, or the command that shows a store."""
    is_server = uri.startswith(("http://", "https://"))
    return uri if is_server else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def read_progress(directory: Path, stage: str) -> Progress | None:
    """The progress that a stage reported last; None before it has started."""
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
            reused = "reused from an earlier run: " if progress.state == "cached" else ""
            note = escape(reused + progress.detail)
            table.add_row(mark, stage, note, "", duration(progress.seconds))
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
    """The end of a run: per stage its time, its key numbers and where its outputs are.

    Args:
        rows: Stage, time, numbers, directory or address.
    """
    table = Table(title=None, header_style="bold")
    for heading in ("stage", "time", "key numbers", "outputs"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
