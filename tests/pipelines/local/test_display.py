from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from components.runtime.context import RunContext
from components.runtime.progress import Progress
from pipelines.local.display import (
    RunDisplay,
    console,
    mlflow_hint,
    progress_table,
    read_progress,
    run_display,
    summary_table,
)
from tests.pipelines.specs import REPOSITORY


def drawn(table: object) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(table)
    return file.getvalue()


def write(folder: Path, progress: Progress) -> None:
    (folder / f"{progress.stage}.json").write_text(progress.model_dump_json())


def test_each_stage_shows_how_it_stands(tmp_path: Path) -> None:
    write(tmp_path, Progress(stage="curate", state="cached", seconds=2, detail="96 of 98 kept"))
    write(
        tmp_path,
        Progress(
            stage="pretrain", task="training", done=30, total=120, unit="step", rate=143.2,
            seconds_left=80, detail="loss 10.21",
        ),
    )  # fmt: skip
    lines = drawn(progress_table(tmp_path)).splitlines()
    assert "reused from an earlier run: 96 of 98 kept" in lines[0]
    assert "30/120 steps · loss 10.21 · 143 images/s" in lines[1]
    assert "1 min 20 s left" in lines[1]
    assert [line.split()[1] for line in lines[2:5]] == ["finetune", "evaluate", "register"]


def test_an_absent_or_torn_file_is_no_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path, "curate") is None
    (tmp_path / "curate.json").write_text('{"stage": "cu')
    assert read_progress(tmp_path, "curate") is None


def test_the_summary_has_a_row_per_stage() -> None:
    text = drawn(summary_table([("curate", "3 s", "10 of 12 kept", "runs/x")]))
    assert "10 of 12 kept" in text


@pytest.mark.parametrize("name", ["work", "[v1] [/x] [bold]", "a ? b"])
def test_a_run_shows_where_its_files_are(name: str, tmp_path: Path) -> None:
    """Whatever the directory is called."""
    file = io.StringIO()
    context = RunContext(workdir=f"{tmp_path}/{name}", run_id="r", run_name="r")
    display = RunDisplay(Console(file=file, width=400))
    display.start(context, log=context.root / "logs" / "r.log")
    display.line("[pretrain] training")
    lines = file.getvalue().splitlines()
    assert lines[0] == f"log: {tmp_path}/{name}/logs/r.log"
    health = f"{tmp_path}/{name}/stages/pretrain/*/health/health.html"
    assert lines[1] == f"health page, once training has begun: {health}"
    assert lines[2] == f"MLflow: {mlflow_hint(context.resolved_tracking_uri)}"
    assert lines[3] == "[pretrain] training"


def test_on_a_terminal_a_table_replaces_the_lines_of_stages(tmp_path: Path) -> None:
    file = io.StringIO()
    context = RunContext(workdir=str(tmp_path), run_id="r", run_name="r")
    context.progress_directory.mkdir(parents=True)
    write(context.progress_directory, Progress(stage="curate", task="scanning", done=3, total=9))
    screen = Console(file=file, width=160, force_terminal=True)
    with run_display(screen) as display:
        display.start(context, log=tmp_path / "log")
        display.line("[curate] a line for the log")
        display.refresh()
    assert "scanning" in file.getvalue()
    assert "a line for the log" not in file.getvalue()


def test_mlflow_is_named_as_it_is_opened() -> None:
    assert mlflow_hint("http://host:5000") == "http://host:5000"
    assert (
        mlflow_hint("sqlite:////w/mlflow.db")
        == "mlflow ui --backend-store-uri sqlite:////w/mlflow.db"
    )
    assert (
        mlflow_hint("sqlite:////a b/m.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    )


def test_a_reader_that_leaves_ends_the_output_and_not_the_program() -> None:
    code = (
        "import sys; from pipelines.local.display import console\n"
        "screen = console()\n"
        "for i in range(2_000): screen.out(i)\n"
        "sys.stderr.write('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == "done"
    assert process.wait() == 0


def test_a_file_gets_wide_tables() -> None:
    assert console().width >= 80
